"""Put on PYTHONPATH by ``gradwatch run``: watches ``torch.optim`` for its first import, then chains the user's own.

It imports nothing but the standard library until torch is imported by the program itself, and whatever goes wrong in
it must not be noticed by that program.
"""

import os
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec


def _chain() -> None:
    """Run the ``sitecustomize`` that this one hides."""
    here = os.path.dirname(os.path.abspath(__file__))  # noqa: PTH100, PTH120 -- pathlib costs each process 5 ms
    elsewhere = [path for path in sys.path if os.path.abspath(path or ".") != here]  # noqa: PTH100
    spec = PathFinder.find_spec("sitecustomize", elsewhere)
    if spec is None or spec.loader is None:
        return
    module = module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


class _Finder:
    """Lets ``torch.optim`` be imported as ever, and then starts the agent's automatic form."""

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
                from gradwatch.launch.command import watch_automatically

                watch_automatically()
            except Exception as error:  # the program must not notice
                sys.stderr.write(f"gradwatch: cannot watch this process: {type(error).__name__}: {error}\n")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if os.environ.get("GRADWATCH_LAUNCH"):
    sys.meta_path.insert(0, _Finder())
_chain()
