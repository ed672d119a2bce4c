"""Mirrors: the numbers of the whole run in the logger that the user already has."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

Logger = Literal["tensorboard", "wandb", "mlflow"]


class Mirror(Protocol):
    """Where run-level scalars are written, too."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of one step."""

    def close(self) -> None:
        """Nothing more comes."""


def mirror(logger: Logger, **options: Any) -> Mirror:
    """Return the mirror to ``logger``.

    Args:
        logger: ``tensorboard`` (options of ``torch.utils.tensorboard.SummaryWriter``), ``wandb`` (the run that
            ``wandb.init`` opened), ``mlflow`` (the active run).
        options: passed to the logger.

    Raises:
        ValueError: the logger is not known.
        ModuleNotFoundError: it is not installed.
    """
    if logger == "tensorboard":
        return TensorBoard(**options)
    if logger == "wandb":
        return Wandb(**options)
    if logger == "mlflow":
        return Mlflow(**options)
    raise ValueError(f"mirror({logger!r}) is not known: {', '.join(get_args(Logger))}")


class TensorBoard:
    """Writes event files."""

    def __init__(self, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(**options)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"gradwatch/{name}", value, step)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


class Wandb:
    """Logs to the user's run."""

    def __init__(self, **options: Any) -> None:
        import wandb

        self._run: Any = wandb.run or wandb.init(**options)
        # A step of its own: wandb drops what is logged with a lower step than the user's last.
        self._run.define_metric("gradwatch/step", hidden=True)
        self._run.define_metric("gradwatch/*", step_metric="gradwatch/step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        values = {f"gradwatch/{name}": value for name, value in scalars.items()}
        self._run.log({**values, "gradwatch/step": step})

    def close(self) -> None:
        """The run is the user's."""


class Mlflow:
    """Logs to the user's run, or one of its own."""

    def __init__(self, **options: Any) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient(**options)
        self._run_id = (mlflow.active_run() or mlflow.start_run()).info.run_id

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the numbers of one step."""
        for name, value in scalars.items():
            self._client.log_metric(self._run_id, f"gradwatch/{name}", value, step=step)

    def close(self) -> None:
        """The run is the user's."""
