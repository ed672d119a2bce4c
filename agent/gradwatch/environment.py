"""Settings from the environment: NAME, or NAME_FILE that names a file, for secrets."""

import os
from pathlib import Path


def setting(name: str) -> str | None:
    """Return the value of NAME, or the content of the file that NAME_FILE names; none where neither is set or empty.

    Raises:
        ValueError: both are set, or the file cannot be read; the text names them.
    """
    value, path = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value and path:
        raise ValueError(f"{name} and {name}_FILE are both set: keep one of them")
    if not path:
        return value or None
    try:
        return Path(path).read_text(encoding="utf-8").strip() or None
    except OSError as error:
        raise ValueError(f"{name}_FILE: {error}") from None
