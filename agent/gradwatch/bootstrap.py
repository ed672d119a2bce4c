"""Attaching without a line of code: waits for torch, then for the first optimizer step, then finds the model.

Imported in every Python process that ``gradwatch run`` starts: it imports nothing but the standard library until the
program itself imports ``torch.optim``.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

_WAITED_FOR = "torch.optim.optimizer"


class _Finder(importlib.abc.MetaPathFinder):
    """Notices the import of torch's optimizers and calls ``gradwatch.unattended`` behind it."""

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Loads the module with its own loader, then arms the agent."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        module.__loader__ = self._loader
        try:
            from gradwatch.unattended import arm

            arm(module)
        except Exception as error:
            print(f"gradwatch: not attached: {type(error).__name__}: {error}", file=sys.stderr)


def wait_for_torch() -> None:
    """Arm the agent as soon as this process imports ``torch.optim``; at once where it has."""
    if _WAITED_FOR in sys.modules:
        from gradwatch.unattended import arm

        arm(sys.modules[_WAITED_FOR])
    else:
        sys.meta_path.insert(0, _Finder())
