"""One colour for each thing, by its name, on every board: as on gradwatch's own page and in chat messages."""

from typing import Any

from gradwatch_server.diagnosis.rules import RULES as DIAGNOSIS_RULES

Mapping = dict[str, Any]
Steps = tuple[tuple[float | None, str], ...]

UNKNOWN = "\u2013"
"""A dash stands for what is not known."""
CRITICAL, WARNING, GOOD, PLAIN = "red", "orange", "green", "text"
SEVERITIES = {"critical": CRITICAL, "warning": WARNING}
STATES = {
    "running": GOOD,
    "stalled": WARNING,
    "completed": "blue",
    "finished": "blue",
    "failed": CRITICAL,
    "killed": CRITICAL,
    "firing": CRITICAL,
    "resolved": GOOD,
    "delivered": GOOD,
    "due": WARNING,
    "dead": CRITICAL,
}
RULES = {rule.name: rule.colour for rule in DIAGNOSIS_RULES}
NOT_FINITE = "#b30000"
"""Of NaN and infinity in a map, as on the page's."""
NOT_FINITE_WORD = "semi-dark-red"
"""Of the words and of single points: they are read on a dark and on a light ground."""
ZERO = "#000000"
LINE = "semi-dark-blue"

_VIRIDIS = (
    *("#440154", "#482173", "#433e85", "#38588c", "#2d708e", "#25858e", "#1e9b8a", "#2ab07f", "#52c569", "#86d549"),
    *("#c2df23", "#fde725"),
)
_DECADES = (-12, -10, -8, -6, -5, -4, -3, -2, -1, 0, 3)
RATIO: Steps = ((None, _VIRIDIS[0]), *zip((10.0**decade for decade in _DECADES), _VIRIDIS[1:], strict=True))
"""Ratios of gradient to weight by decades: the page's scale, dark is small and bright is large; none of it is bad."""
_WORDS = (f"< 1e{_DECADES[0]}", *(f"\u2265 1e{decade}" for decade in _DECADES))
RATIO_LEGEND = dict(zip(_WORDS, _VIRIDIS, strict=True)) | {
    "exactly 0": ZERO,
    "NaN or infinite": NOT_FINITE,
    "blank: no sample, or no gradient": "transparent",
}
"""What the colours of a map mean, in the order of its legend."""
NEUTRAL: Steps = ((None, PLAIN),)
NONE_IS_BEST: Steps = ((None, PLAIN), (1, CRITICAL))
FEW_ARE_BEST: Steps = ((None, PLAIN), (1, WARNING))


def thresholds(steps: Steps) -> dict[str, Any]:
    """Return thresholds as Grafana stores them."""
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}


def named(colours: dict[str, str]) -> Mapping:
    """Return the mapping that colours texts by what they say."""
    options = {text: {"color": colour, "index": place} for place, (text, colour) in enumerate(colours.items())}
    return {"type": "value", "options": options}


def special(match: str, text: str, colour: str | None = None) -> Mapping:
    """Return the mapping of a special value (``null``, ``nan``) to a word and a colour."""
    result = {"text": text, "index": 90} | ({"color": colour} if colour else {})
    return {"type": "special", "options": {"match": match, "result": result}}


NUMBERS: tuple[Mapping, ...] = (
    special("nan", "NaN", NOT_FINITE_WORD),
    {
        "type": "value",
        "options": {
            "Infinity": {"text": "infinite", "color": NOT_FINITE_WORD, "index": 91},
            "-Infinity": {"text": "-infinite", "color": NOT_FINITE_WORD, "index": 92},
        },
    },
    special("null", UNKNOWN),
)
"""What a number may be instead of a number: never 0, never blank."""
ANY_IS_NOT_FINITE: tuple[Mapping, ...] = (
    special("null", UNKNOWN),
    {
        "type": "range",
        "options": {"from": None, "to": None, "result": {"text": "NaN", "color": NOT_FINITE_WORD, "index": 93}},
    },
)
"""For a series that only marks where something was not finite: its height means nothing."""
