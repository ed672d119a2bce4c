"""gradwatch watches the health of gradients in any PyTorch training job, and clips them adaptively."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if sys.platform == "win32":
    raise ImportError("gradwatch runs on Linux and macOS, and on Windows only within WSL (Windows Subsystem for Linux)")

if TYPE_CHECKING:
    from gradwatch.agent import Agent, attach
    from gradwatch.clipping.agc import AGC
    from gradwatch.clipping.clip_grad import adaptive_clip_grad_

__all__ = ["AGC", "Agent", "__version__", "adaptive_clip_grad_", "attach"]

__version__ = "0.2.0"
"""The one place of the version: the package, its commands, the server and what both send of themselves read it here."""

_HOMES = {
    "AGC": "gradwatch.clipping.agc",
    "Agent": "gradwatch.agent",
    "adaptive_clip_grad_": "gradwatch.clipping.clip_grad",
    "attach": "gradwatch.agent",
}


def __getattr__(name: str) -> Any:
    """Load what needs torch only when it is used: the server imports ``gradwatch.wire`` without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradwatch' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
