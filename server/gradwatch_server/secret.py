"""Secrets from the environment: NAME, or NAME_FILE that names a file."""

import os
from pathlib import Path

from gradwatch_server.errors import ConfigurationError


def from_environment(name: str) -> str | None:
    """Return the value of NAME, or the content of the file that NAME_FILE names, without the line's end.

    Raises:
        ConfigurationError: both are set, or the file cannot be read.
    """
    value, path = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if path is None:
        return value
    if value is not None:
        raise ConfigurationError(f"{name} and {name}_FILE are both set: keep one of them")
    try:
        return Path(path).read_text(encoding="utf-8").rstrip("\n")
    except OSError as error:
        raise ConfigurationError(f"{name}_FILE: {error}") from None
