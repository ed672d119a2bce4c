"""Sets up auto-attach when ``torch.optim`` is first imported, then runs the user's own ``sitecustomize``.

``gradwatch run`` puts this folder on PYTHONPATH. The module imports nothing but the standard library until the program
imports torch, and an error here must not reach the program.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec


def _chain() -> None:
    """Run the ``sitecustomize`` that this module hides."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 -- pathlib costs each process 5 ms
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != here]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


class _Finder:
    """An import hook that sets up auto-attach after ``torch.optim`` was imported in the usual way."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002
        if name != "torch.optim":
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)  # type: ignore[arg-type]
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: object) -> None:
            run(module)  # type: ignore[arg-type]
            try:
                from gradwatch.launch.auto_attach import AutoAttach

                AutoAttach()
            except Exception as error:  # the program must not notice
                sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("GRADWATCH_LAUNCH"):
    sys.meta_path.insert(0, _Finder())
_chain()
