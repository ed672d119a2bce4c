"""The wire format: the documents that an agent sends and a server accepts, with their bounds, for both sides.

MessagePack and JSON carry the same documents. A statistic's vector (one float32 for each parameter of the run) is
packed little-endian bytes in MessagePack and a list in JSON, where a non-finite number is the text "NaN", "Infinity" or
"-Infinity" and a missing one is null. Statistics are never negative, so ``MISSING`` (-1) marks a parameter that had no
gradient in this step: neither 0 nor NaN, from agent to page.

The types carry the bounds of their values. Decoding checks them and the OpenAPI document tells them; encoding does not
check anything, so that it costs a training nothing.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from email.utils import parsedate_to_datetime
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar, get_type_hints

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from gradwatch import statistics
from gradwatch.statistics import MISSING as MISSING
from gradwatch.statistics import RATIO_EPS as RATIO_EPS
from gradwatch.statistics import UNSTEPPED as UNSTEPPED

VERSION: Final = 1
"""Version of the documents below; a server refuses any other version."""

JSON_TYPE: Final = "application/json"
CLOCK_HEADER: Final = "Gradwatch-Clock"
"""Request header with the sender's time in Unix seconds: the server orders the attempts of a run by its own clock."""
MESSAGEPACK_TYPE: Final = "application/vnd.msgpack"

LARGEST_STEP: Final = 2**53
"""Largest step and count: readers of JSON keep no larger integer exactly."""
LARGEST_TIME: Final = 1e11
"""Latest time in Unix seconds."""
MOST_NAME_CHARACTERS: Final = 512
"""Of a name: PostgreSQL takes 2,704 bytes into a key, and a character may have four."""
MOST_SAMPLES: Final = 10_000
"""In one batch."""
MOST_BINS: Final = 1_000
"""In one histogram."""

_RUN_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9_-]{2,63}$(?!\n)"  # Python's $ also matches before a newline at the end
_WITHOUT_NUL: Final = r"^[^\u0000]*$"
PATTERNS: Final = {
    _RUN_ID: "the id of a run: 3 to 64 letters, digits, '-' and '_'",
    _WITHOUT_NUL: "text without NUL, which no database keeps",
}
"""Pattern -> the texts that match it, in words."""

Count = Annotated[int, Meta(ge=0, le=LARGEST_STEP)]
Rank = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Depth = Annotated[int, Meta(ge=0, le=2**31 - 1)]
ExitCode = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
Time = Annotated[float, Meta(ge=0, le=LARGEST_TIME)]
"""Unix seconds."""
Text = Annotated[str, Meta(pattern=_WITHOUT_NUL)]
Name = Annotated[Text, Meta(max_length=MOST_NAME_CHARACTERS)]
FilledName = Annotated[Name, Meta(min_length=1)]
RunId = Annotated[str, Meta(pattern=_RUN_ID)]

STATISTICS: Final = tuple(statistics.STATISTICS)
"""Names of the statistics of a sample: a row of the table of statistics adds one."""
if TYPE_CHECKING:
    Statistic = str
else:
    Statistic = Literal[STATISTICS]

Vector = NDArray[np.float32]
"""One number for each parameter of the run, shape (parameters,), in the order of the registration."""

HISTOGRAM_EDGES: Final[NDArray[np.float64]] = 0.005 * 2.0 ** (np.arange(-12, 21) / 2)
"""Edges between the bins of the histograms of units' ratios ``||g_i|| / max(||w_i||, eps)``, shape (33,): half an
octave wide, from 8e-5 to 5. The first bin holds all at or below the first edge, zeros too, the last one all above."""

HISTOGRAMS: Final = ("unit_ratio_first_third", "unit_ratio_middle_third", "unit_ratio_last_third")
"""Units by their ratio, shape (34,), for the thirds of the depth from the input: what AGC sees, or would see. The
classifier's weight, which AGC leaves alone, is not counted, nor is a unit whose ratio is not finite."""

Number = float | Literal["NaN", "Infinity", "-Infinity"]
"""A float; a non-finite one is written as text, since JSON has no number for it."""


class Parameter(msgspec.Struct, frozen=True):
    """One ``nn.Parameter`` of a run; tied parameters count once."""

    name: Name
    shape: Annotated[list[Count], Meta(max_length=64)]
    dtype: Name = "float32"
    depth: Depth | None = None
    """Order from input to output, 0 first; absent: the order of the list."""
    units: Count = 1
    trainable: bool = True
    kind: Name = ""
    """Type of the module that owns it, such as ``Linear`` or ``BatchNorm2d``; empty if unknown."""


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """Registers a run. Sent again with the same id, it may append parameters.

    Of the parameters that exist it may change only the depth and whether they are trained.
    """

    version: Literal[1] = VERSION
    project: FilledName = "default"
    name: Name = ""
    parameters: Annotated[list[Parameter], Meta(extra_json_schema={"uniqueItems": True})]
    id: RunId | None = None
    """Random id chosen by the agent; absent: the server chooses."""
    started_at: Time | None = None
    """Absent: now."""
    attempt: Count = 0
    """Start of this attempt in Unix milliseconds: a run that is resumed registers again with a larger number."""
    attributes: dict[Name, Text] = {}
    """Facts that help to read the numbers: host, versions, optimizer, ``agc_eps``."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured at one step."""

    step: Count
    at: Time
    statistics: dict[Statistic, Vector] = {}
    scalars: dict[Name, Number] = {}
    """Numbers of the whole run that are measured only with a sample, such as ``global_grad_norm``."""
    histograms: dict[Name, Annotated[list[float], Meta(max_length=MOST_BINS)]] = {}
    """Counts over fixed bins: ``HISTOGRAMS`` over ``HISTOGRAM_EDGES``."""
    unstepped: list[Count] | msgspec.UnsetType = msgspec.UNSET
    """Places of parameters whose gradient is missing because no optimizer steps it: a gradient is there. Absent: none.
    A server that does not know this field takes it for missing."""


class Trail(msgspec.Struct, frozen=True, kw_only=True):
    """One scalar at every step, sampled or not, such as the loss or the norm that clipping returned."""

    steps: list[Count]
    values: list[Number]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the run or to its agent, such as a disarmed agent or the first non-finite module."""

    step: Count
    at: Time
    kind: Name
    message: Text = ""
    parameter: Name | None = None
    """The parameter or module it is about."""


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """How much the agent has dropped in this attempt so far."""

    samples: Count = 0
    bytes: Count = 0
    errors: Count = 0
    values: Count = 0
    """Numbers that belong to no sample: losses and logged numbers."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt is over."""

    at: Time
    status: Name = "completed"
    """``completed``, ``failed`` or ``killed``."""
    exit_code: ExitCode | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Samples and all else that an agent sends at once. The server stores each (run, rank, id) only once."""

    version: Literal[1] = VERSION
    id: FilledName
    rank: Rank = 0
    attempt: Count = 0
    samples: Annotated[list[Sample], Meta(max_length=MOST_SAMPLES)] = []
    trail: dict[Name, Trail] = {}
    events: list[Event] = []
    dropped: Dropped = Dropped()
    end: End | None = None


class _Versioned(msgspec.Struct):
    version: int = VERSION


class WireError(ValueError):
    """A document is not in this format; the text says where and why."""


class BoundsError(WireError):
    """A value of a document has the right type, but is beyond a bound of its field; the text is msgspec's."""


Document = TypeVar("Document", Registration, Batch)

_BEYOND_BOUNDS = re.compile(r"Expected `\w+` (?:>=|<=|of length|matching regex) ")
_PACKED = np.dtype("<f4")
_BEYOND_FLOAT32 = 2.0**128 - 2.0**103
"""The least number that rounds to an infinite float32."""
_INFINITE = (float("inf"), float("-inf"))
_FLOATS: Final[dict[object, float]] = {
    None: MISSING,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}


def serialise(value: float) -> Number:
    """Return a float as JSON can carry it: text where it is not finite."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def deserialise(number: Number) -> float:
    """Return the float from which ``serialise`` made this number."""
    return _FLOATS[number] if isinstance(number, str) else float(number)


def serialise_numbers(values: NDArray[Any]) -> list[Number]:
    """Return the elements of a vector as JSON can carry them; -1 is a number like any other here."""
    return [serialise(value) for value in values.tolist()]


def serialise_vector(vector: NDArray[Any]) -> list[Any]:
    """Return a vector or matrix of statistics as JSON carries it: null where missing, text where not finite."""
    missing = vector == MISSING
    if np.isfinite(vector).all() and not missing.any():
        finite: list[Any] = vector.tolist()
        return finite
    elements = vector.astype(object)
    elements[np.isnan(vector)] = "NaN"
    elements[vector == np.inf] = "Infinity"
    elements[vector == -np.inf] = "-Infinity"
    elements[missing] = None
    listed: list[Any] = elements.tolist()
    return listed


def _encode(value: object) -> object:
    if isinstance(value, np.ndarray):
        return value.astype(_PACKED, copy=False).tobytes()
    raise NotImplementedError(f"cannot encode {type(value).__name__}")


def _decode(_kind: type, value: object) -> object:
    if isinstance(value, bytes | bytearray | memoryview):
        if len(value) % 4:
            raise ValueError(f"a packed vector holds float32: {len(value)} bytes are not a multiple of 4")
        return np.frombuffer(value, _PACKED).astype(np.float32, copy=False)
    if isinstance(value, list):
        return np.array([_element(item) for item in value], np.float32)
    raise ValueError(f"a vector is a list of numbers or packed float32 bytes, not {type(value).__name__}")


def _element(item: object) -> float:
    if isinstance(item, int | float) and not isinstance(item, bool):
        if abs(item) >= _BEYOND_FLOAT32 and item not in _INFINITE:
            raise ValueError(f"a vector holds float32: {item!r:.40} is beyond its range")
        return float(item)
    try:
        return _FLOATS[item]
    except (KeyError, TypeError):
        raise ValueError(f'a vector holds numbers, null, "NaN", "Infinity" or "-Infinity", not {item!r:.40}') from None


_to_messagepack = msgspec.msgpack.Encoder(enc_hook=_encode)


def encode(document: Registration | Batch) -> bytes:
    """Return the document as MessagePack (``MESSAGEPACK_TYPE``)."""
    return _to_messagepack.encode(document)


def encode_json(document: Registration | Batch) -> bytes:
    """Return the document as JSON (``JSON_TYPE``): the same content, for those who write by hand."""
    content = msgspec.to_builtins(document, enc_hook=serialise_vector, builtin_types=(bytes,))
    return msgspec.json.encode(_serialise_floats(content))


def _serialise_floats(value: Any) -> Any:
    if isinstance(value, float):
        return serialise(value)
    if isinstance(value, dict):
        return {key: _serialise_floats(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_serialise_floats(item) for item in value]
    return value


def decode(body: bytes, document: type[Document], content_type: str = MESSAGEPACK_TYPE) -> Document:
    """Return the document that ``body`` holds.

    Raises:
        BoundsError: a value is beyond a bound of its field; the text names the place.
        WireError: the body is not of this format or of another version; the text names the place.
    """
    codec: Any = msgspec.json if content_type == JSON_TYPE else msgspec.msgpack
    try:
        version = codec.decode(body, type=_Versioned).version
        if version != VERSION:
            raise WireError(
                f"version {version} is unknown: this server reads version {VERSION}; upgrade the older side"
            )
        decoded: Document = codec.decode(body, type=document, dec_hook=_decode)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        kind = BoundsError if _BEYOND_BOUNDS.match(str(error)) else WireError
        raise kind(str(error)) from None
    return decoded


def checksum_of_parameters(parameters: Iterable[tuple[str, Sequence[int]]]) -> str:
    """Return a checksum over names and shapes in any order: 16 hexadecimal digits."""
    lines = sorted(f"{name} {list(shape)}" for name, shape in parameters)
    return hashlib.sha256("\n".join(lines).encode("utf-8", "replace")).hexdigest()[:16]


def retry_after_seconds(header: str | None, now: float) -> float | None:
    """Return the pause in seconds that the HTTP header Retry-After asks for (RFC 9110, section 10.2.3).

    Args:
        header: a whole number of seconds, or a date; None: the response has no such header.
        now: Unix seconds, from which the pause until a date is counted; it is 0 for a date in the past.

    Returns:
        The pause; None if there is no header or it has neither form.
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - now)
    except ValueError:
        return None


def _without_bounds(kind: type[msgspec.Struct], **parts: object) -> Any:
    """Return a subclass of a document's type whose fields have no bounds; ``parts`` are the types of some fields."""
    hints = get_type_hints(kind) | parts  # these leave out what Annotated adds
    defined = list[tuple[str, Any, Any]]()
    for field in msgspec.structs.fields(kind):
        made_anew = field.default_factory is not msgspec.NODEFAULT
        default = msgspec.field(default_factory=field.default_factory) if made_anew else field.default
        defined.append((field.name, hints[field.name], default))
    return msgspec.defstruct(kind.__name__, defined, bases=(kind,), frozen=True, kw_only=True)


_to_batch = msgspec.msgpack.Decoder(
    _without_bounds(
        Batch,
        samples=GenericAlias(list, _without_bounds(Sample)),
        trail=GenericAlias(dict, (str, _without_bounds(Trail))),
        events=GenericAlias(list, _without_bounds(Event)),
        dropped=_without_bounds(Dropped),
        end=_without_bounds(End) | None,
    ),
    dec_hook=_decode,
)


def read_back(body: bytes) -> Batch:
    """Return a batch that ``encode`` made, whatever bounds it breaks.

    An agent decodes what its spool holds to divide it or to thin it out. A value beyond its bound has to be encoded
    again, so that the server refuses the smallest part that holds it, and not the whole batch.

    Raises:
        WireError: the body is no batch.
    """
    try:
        batch: Batch = _to_batch.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise WireError(str(error)) from None
    return batch
