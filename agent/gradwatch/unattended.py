"""The agent without a line of code: armed by ``gradwatch run`` while torch is imported, attached at the first step."""

import functools
import os
import sys
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim.optimizer import Optimizer

    from gradwatch.agent import Agent


def arm(optimizers: ModuleType) -> None:
    """Wait for the first optimizer that is made: torch is whole by then, and no forward pass has run as a rule."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    kind = optimizers.Optimizer
    original = kind.__init__

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807  # takes the place of one
        original(self, *args, **kwargs)
        if kind.__init__ is __init__:
            kind.__init__ = original
            try:
                _Unattended()
            except Exception as error:
                print(f"gradwatch: not attached: {type(error).__name__}: {error}", file=sys.stderr)

    kind.__init__ = __init__


class _Unattended:
    """Listens until the first step, then attaches an agent to the root modules that have run until then."""

    def __init__(self) -> None:
        from torch.nn.modules.module import register_module_forward_pre_hook

        from gradwatch import taps

        self._seen: dict[int, nn.Module] = {}
        self._forward = register_module_forward_pre_hook(self._note)
        self._loss: Tensor | None = None
        taps.listen(self)

    def _note(self, module: "nn.Module", _inputs: Any) -> None:
        self._seen[id(module)] = module

    def on_step(self, optimizer: "Optimizer", args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Attach, and let the agent take part in this first step."""
        from gradwatch import taps

        try:
            agent = self._attach(optimizer)
        except Exception as error:
            print(f"gradwatch: not attached: {type(error).__name__}: {error}", file=sys.stderr)
            return None
        finally:
            self._forward.remove()
            self._seen.clear()
            taps.ignore(self)
        if self._loss is not None:
            agent.on_backward(self._loss)
            self._loss = None
        return agent.on_step(optimizer, args, kwargs)

    def on_backward(self, loss: "Tensor") -> None:
        """Keep the first loss for the agent."""
        self._loss = loss.detach()

    def on_clip(self, parameters: Any, max_norm: float, total_norm: "Tensor") -> None:
        """Nothing is attached yet."""

    def _attach(self, optimizer: "Optimizer") -> "Agent":
        from torch import nn

        from gradwatch.agent import attach

        stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        roots = self._roots({id(parameter) for parameter in stepped})
        agent = attach(roots or nn.ParameterList(stepped))
        _finish_with_exit_status(agent)
        return agent

    def _roots(self, wanted: set[int]) -> list["nn.Module"]:
        """Return the outermost of the modules that have run and hold parameters of the optimizer."""
        inner = {id(child) for module in self._seen.values() for child in module.modules() if child is not module}
        return [
            module
            for key, module in self._seen.items()
            if key not in inner and any(id(parameter) in wanted for parameter in module.parameters())
        ]


def _finish_with_exit_status(agent: "Agent") -> None:
    """Have the run end as the program does; the program's own ways are left as they are."""
    hook, leave = sys.excepthook, sys.exit

    def excepthook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        agent.outcome = ("failed", 1)
        hook(kind, error, trace)

    def exit_with(status: Any = None, /) -> None:
        code = status if isinstance(status, int) else int(status is not None)
        agent.outcome = ("failed" if code else "completed", code)
        leave(status)

    agent.outcome = ("completed", 0)
    sys.excepthook = excepthook
    sys.exit = exit_with  # type: ignore[assignment]
