"""The Lightning callback: ``Trainer(callbacks=[GradwatchCallback()])``."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ModuleNotFoundError:  # the older package has the same classes, and a Trainer takes its own alone
    from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[no-redef,assignment,unused-ignore]

from gradwatch.agent import Agent, attach_restored
from gradwatch.recording.restored_steps import steps_made


class GradwatchCallback(Callback):
    """Attaches an agent when the training starts, and closes it when the training ends or fails.

    Args:
        options: those of ``gradwatch.attach``; ``step`` is taken from the trainer.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.agent: Agent | None = None
        self._checkpoint = ""
        """Run that the checkpoint names which the training was restored from."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the run with the checkpoint, so that it goes on where the training is interrupted and restored."""
        if self.agent is not None:
            checkpoint["gradwatch_run"] = self.agent.run_id

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read which run the checkpoint belongs to."""
        self._checkpoint = str(checkpoint.get("gradwatch_run", ""))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: only now the optimizers exist, and a checkpoint with its number of steps is restored."""
        options = {"step": _steps_made(trainer), **self._options}
        self.agent = attach_restored(pl_module, trainer.optimizers, self._checkpoint, **options)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the agent with the status ``completed``."""
        self._close("completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the agent with the status ``failed``."""
        self._close("failed")

    def _close(self, status: str) -> None:
        if self.agent is not None:
            self.agent.close(status=status)


def _steps_made(trainer: Trainer) -> int:
    """Return the number of steps that were made before this training."""
    # Lightning adds the steps of several optimizers up; Adam and its like each count their own.
    made = steps_made(trainer.optimizers, wait=True) if len(trainer.optimizers) > 1 else 0
    return made or trainer.global_step
