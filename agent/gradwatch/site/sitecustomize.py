"""Put on PYTHONPATH by ``gradwatch run``: attaches the agent when the program itself imports torch.

Whatever fails here must not reach the program: without gradwatch it would have run as well.
"""

import contextlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path

_HERE = str(Path(__file__).parent)


def _chain() -> None:
    """Run the sitecustomize that the user has behind ours."""
    others = [path for path in sys.path if Path(path or ".").resolve() != Path(_HERE).resolve()]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["sitecustomize"] = module
        spec.loader.exec_module(module)


if os.environ.get("GRADWATCH_ATTACH") == "1":
    with contextlib.suppress(Exception):
        from gradwatch.bootstrap import wait_for_torch

        wait_for_torch()
_chain()
