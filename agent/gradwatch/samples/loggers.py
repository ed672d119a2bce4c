"""Writing run-level scalars to the logger that the user already has: TensorBoard, Weights & Biases or MLflow."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol, get_args

LoggerName = Literal["tensorboard", "wandb", "mlflow"]


class ScalarLogger(Protocol):
    """A logger that takes the run-level scalars of one step at a time."""

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step, each under the name ``gradwatch/<name>``."""

    def close(self) -> None:
        """Flush all buffers; nothing is written afterwards. A run that belongs to the user stays open."""


def open_logger(name: LoggerName, **options: Any) -> ScalarLogger:
    """Return a logger of this kind.

    Args:
        name: ``tensorboard`` (options of ``torch.utils.tensorboard.SummaryWriter``), ``wandb`` (the run that
            ``wandb.init`` opened), ``mlflow`` (the active run).
        options: passed to the library.

    Raises:
        ValueError: the name is not one of these.
        ModuleNotFoundError: the library is not installed.
    """
    if name == "tensorboard":
        return TensorBoardLogger(**options)
    if name == "wandb":
        return WandbLogger(**options)
    if name == "mlflow":
        return MlflowLogger(**options)
    raise ValueError(f"mirror({name!r}) is not known: {', '.join(get_args(LoggerName))}")


class UserLoggers:
    """The loggers that the user's numbers go to as well; one that raises an error is not used any more.

    Args:
        warn: called with a warning for the user.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._loggers: tuple[ScalarLogger, ...] = ()

    def __bool__(self) -> bool:
        return bool(self._loggers)

    def add(self, logger: ScalarLogger) -> None:
        """Write to this logger, too."""
        self._loggers = (*self._loggers, logger)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of one step."""
        for logger in self._loggers if scalars else ():
            try:
                logger.write(step, scalars)
            except Exception as error:  # a closed logger or a full disk is not the agent's fault
                self._loggers = tuple(other for other in self._loggers if other is not logger)
                self._warn(f"nothing more is mirrored to {type(logger).__name__}: {type(error).__name__}: {error}")

    def close(self) -> None:
        """Close all of them, whatever they raise."""
        for logger in self._loggers:
            with contextlib.suppress(Exception):
                logger.close()


class TensorBoardLogger:
    """Writes event files of its own."""

    def __init__(self, **options: Any) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(**options)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Add one scalar event for each name."""
        for name, value in scalars.items():
            self._writer.add_scalar(f"gradwatch/{name}", value, step)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbLogger:
    """Logs to the user's wandb run; opens one where there is none."""

    def __init__(self, **options: Any) -> None:
        import wandb

        self._run: Any = wandb.run or wandb.init(**options)
        # wandb drops a value whose step is lower than the user's last one, so ours have a step metric of their own.
        self._run.define_metric("gradwatch/step", hidden=True)
        self._run.define_metric("gradwatch/*", step_metric="gradwatch/step")

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log the scalars with ``gradwatch/step`` as their x axis."""
        values = {f"gradwatch/{name}": value for name, value in scalars.items()}
        self._run.log({**values, "gradwatch/step": step})

    def close(self) -> None:
        """Leave the run open: the user finishes it."""


class MlflowLogger:
    """Logs to the user's active MLflow run; starts one where there is none."""

    def __init__(self, **options: Any) -> None:
        import mlflow

        self._client: Any = mlflow.MlflowClient(**options)
        self._run_id = (mlflow.active_run() or mlflow.start_run()).info.run_id

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Log one metric for each name."""
        for name, value in scalars.items():
            self._client.log_metric(self._run_id, f"gradwatch/{name}", value, step=step)

    def close(self) -> None:
        """Leave the run open: the user ends it."""
