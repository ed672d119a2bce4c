"""The agent as a Lightning callback: ``Trainer(callbacks=[GradwatchCallback()])``."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gradwatch.agent import Agent, attach
from gradwatch.recording.restored_steps import steps_made


class GradwatchCallback(Callback):
    """Attaches when the training starts, closes when it ends or fails.

    Args:
        options: those of ``gradwatch.attach``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.agent: Agent | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; by now the optimizers exist and a checkpoint is restored, the number of its steps too."""
        options = {"step": _steps_made(trainer), **self._options}
        self.agent = attach(pl_module, trainer.optimizers, **options)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the run."""
        self._close("completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the run as failed."""
        self._close("failed")

    def _close(self, status: str) -> None:
        if self.agent is not None:
            self.agent.close(status=status)


def _steps_made(trainer: Trainer) -> int:
    """Return the number of steps; Lightning adds those of several optimizers up, each of Adam's kind counts its own."""
    made = steps_made(trainer.optimizers, wait=True) if len(trainer.optimizers) > 1 else 0
    return made or trainer.global_step
