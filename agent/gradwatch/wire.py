"""The wire format: what an agent sends and a server accepts, defined once and imported by both sides.

MessagePack and JSON carry the same documents. A statistic's vector (one float32 for each parameter of the run) is
packed little-endian bytes in MessagePack and a list in JSON, where a non-finite number is spelled "NaN", "Infinity" or
"-Infinity" and a missing one is null. Statistics are never negative, so ``MISSING`` (-1) marks a parameter that had no
gradient in this round: neither 0 nor NaN, from agent to page.
"""

from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from gradwatch import statistics
from gradwatch.statistics import MISSING as MISSING
from gradwatch.statistics import RATIO_EPS as RATIO_EPS

VERSION: Final = 1
"""Version of the documents below; a server refuses any other by name."""

JSON_TYPE: Final = "application/json"
CLOCK_HEADER: Final = "Gradwatch-Clock"
"""Of a request: Unix seconds by the sender's clock, so that a run's attempts are ordered by one clock, the server's."""
MESSAGEPACK_TYPE: Final = "application/vnd.msgpack"

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

Spelled = Literal["NaN", "Infinity", "-Infinity"]
Number = float | Spelled
"""A float; in JSON a non-finite one is spelled, since JSON has none."""


class Parameter(msgspec.Struct, frozen=True):
    """One ``nn.Parameter`` of a run; tied parameters count once."""

    name: str
    shape: list[int]
    dtype: str = "float32"
    depth: int | None = None
    """Order from input to output, 0 first; absent: the order of the list."""
    units: int = 1
    trainable: bool = True
    kind: str = ""
    """Type of the module that owns it (``Linear``, ``BatchNorm2d``), empty where unknown."""


class Registration(msgspec.Struct, frozen=True, kw_only=True):
    """A run makes itself known. Sent again with the same id, it may append parameters.

    Of those that are known it may change the depth and whether they are trained, no more.
    """

    version: int = VERSION
    project: str = "default"
    name: str = ""
    parameters: list[Parameter]
    id: str | None = None
    """Random id chosen by the agent; absent: the server chooses."""
    started_at: float | None = None
    """Unix seconds; absent: now."""
    attempt: int = 0
    """Start of this attempt in Unix milliseconds: a resumed run registers again with a larger one."""
    attributes: dict[str, str] = {}
    """What helps to read the numbers: host, versions, optimizer, ``agc_eps``."""


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """Everything measured at one step."""

    step: int
    at: float
    """Unix seconds."""
    statistics: dict[Statistic, Vector] = {}
    scalars: dict[str, Number] = {}
    """Numbers of the whole run that are known only at a sample, such as ``global_grad_norm``."""
    histograms: dict[str, list[float]] = {}
    """Counts over fixed bins: ``HISTOGRAMS`` over ``HISTOGRAM_EDGES``."""


class Trail(msgspec.Struct, frozen=True, kw_only=True):
    """One scalar of every step, sampled or not: the loss, the norm that clipping returned."""

    steps: list[int]
    values: list[Number]


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened to the run or to its agent, such as a disarmed agent or the first non-finite module."""

    step: int
    at: float
    kind: str
    message: str = ""
    parameter: str | None = None
    """The parameter or module it is about."""


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """What the agent had to give up so far, counted over the attempt."""

    samples: int = 0
    bytes: int = 0
    errors: int = 0
    values: int = 0
    """Numbers that belong to no sample: losses and what was logged."""


class End(msgspec.Struct, frozen=True, kw_only=True):
    """The attempt is over."""

    at: float
    status: str = "completed"
    """``completed``, ``failed`` or ``killed``."""
    exit_code: int | None = None


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """What an agent sends at once. Sending it again changes nothing: (run, rank, id) is remembered."""

    version: int = VERSION
    id: str
    rank: int = 0
    attempt: int = 0
    samples: list[Sample] = []
    trail: dict[str, Trail] = {}
    events: list[Event] = []
    dropped: Dropped = Dropped()
    end: End | None = None


class _Versioned(msgspec.Struct):
    version: int = VERSION


class WireError(ValueError):
    """A document that is not in this format; the text says where and why."""


Document = TypeVar("Document", Registration, Batch)

_PACKED = np.dtype("<f4")
_BEYOND_FLOAT32 = 2.0**128 - 2.0**103
"""The least number that rounds to an infinite float32; its largest, written in the fewest digits, is below."""
_INFINITE = (float("inf"), float("-inf"))
_UNSPELLED: Final[dict[object, float]] = {
    None: MISSING,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "-Infinity": float("-inf"),
}


def spell(value: float) -> Number:
    """Return ``value`` as JSON can carry it."""
    if value != value:
        return "NaN"
    if value in (float("inf"), float("-inf")):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def number(spelled: Number) -> float:
    """Return the float that ``spelled`` stands for."""
    return _UNSPELLED[spelled] if isinstance(spelled, str) else float(spelled)


def spell_numbers(values: NDArray[Any]) -> list[Number]:
    """Return numbers that are all measured as JSON can carry them."""
    return [spell(value) for value in values.tolist()]


def spell_vector(vector: NDArray[Any]) -> list[Any]:
    """Return a vector or matrix of statistics as JSON carries it: null where missing, spelled where not finite."""
    missing = vector == MISSING
    if np.isfinite(vector).all() and not missing.any():
        finite: list[Any] = vector.tolist()
        return finite
    spelled = vector.astype(object)
    spelled[np.isnan(vector)] = "NaN"
    spelled[vector == np.inf] = "Infinity"
    spelled[vector == -np.inf] = "-Infinity"
    spelled[missing] = None
    listed: list[Any] = spelled.tolist()
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
        return _UNSPELLED[item]
    except (KeyError, TypeError):
        raise ValueError(f'a vector holds numbers, null, "NaN", "Infinity" or "-Infinity", not {item!r:.40}') from None


_to_messagepack = msgspec.msgpack.Encoder(enc_hook=_encode)


def encode(document: Registration | Batch) -> bytes:
    """Return the document as MessagePack (``MESSAGEPACK_TYPE``)."""
    return _to_messagepack.encode(document)


def encode_json(document: Registration | Batch) -> bytes:
    """Return the document as JSON (``JSON_TYPE``): the same content, for those who write by hand."""
    return msgspec.json.encode(_spelled(msgspec.to_builtins(document, enc_hook=spell_vector, builtin_types=(bytes,))))


def _spelled(value: Any) -> Any:
    if isinstance(value, float):
        return spell(value)
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    return value


def decode(body: bytes, document: type[Document], content_type: str = MESSAGEPACK_TYPE) -> Document:
    """Return the document that ``body`` holds.

    Raises:
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
        raise WireError(str(error)) from None
    return decoded
