"""Text of strangers, such as the names of runs, made safe to show: in a terminal, a log, a mail, a chat or a table."""

import unicodedata
from typing import Any

_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Categories of characters that act instead of being seen: control, format, surrogates, separators of lines."""
_JOINERS = "\u200c\u200d"
"""Format characters that words of some languages, and emojis, need."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def visible(text: str, keep: str = "") -> str:
    r"""Return a text in which characters that act instead of being seen are escaped: ESC is ``\x1b``.

    So no text moves the cursor of a terminal, begins a line or a header, or runs from right to left.

    Args:
        text: any text.
        keep: characters that are left as they are, such as the line breaks of a traceback.
    """
    if text.isprintable():
        return text
    return "".join(_escaped(character) if character not in keep else character for character in text)


def _escaped(character: str) -> str:
    if unicodedata.category(character) not in _HIDDEN or character in _JOINERS:
        return character
    return character.encode("unicode_escape").decode("ascii")


def visible_document(document: Any) -> Any:
    """Return a JSON document in which all texts, but not the keys of its objects, are ``visible``."""
    if isinstance(document, str):
        return visible(document)
    if isinstance(document, dict):
        return {key: visible_document(value) for key, value in document.items()}
    return [visible_document(value) for value in document] if isinstance(document, list) else document


def table_cell(text: str) -> str:
    """Return a text as a cell that no spreadsheet takes for a formula: visible, with an apostrophe in front."""
    return "'" + visible(text) if text.startswith(_FORMULA) else visible(text)
