"""The agent as a Lightning callback: ``Trainer(callbacks=[GradwatchCallback()])``."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from gradwatch.agent import Agent, attach


class GradwatchCallback(Callback):
    """Attaches when the fit starts, closes when it ends or fails.

    Args:
        options: those of ``gradwatch.attach``.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.agent: Agent | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach; the optimizers exist by now, automatic and manual optimisation step them alike."""
        self.agent = attach(pl_module, trainer.optimizers, **self._options)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish the run."""
        self._close("completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the run as failed."""
        self._close("failed")

    def _close(self, status: str) -> None:
        if self.agent is not None:
            self.agent.close(status=status)
