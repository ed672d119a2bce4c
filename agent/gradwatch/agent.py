"""Attaching to a training: ``attach`` and the ``Agent`` that it returns."""

import math
import operator
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Final, Self, SupportsFloat, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.clipping.agc import AGC
from gradwatch.lifecycle import shutdown
from gradwatch.lifecycle.shutdown import CLOSING_SECONDS
from gradwatch.recording.optimizers import unwrapped
from gradwatch.samples.loggers import LoggerName
from gradwatch.session import Session
from gradwatch.settings import resolve

_STATUSES: Final = ("completed", "failed", "killed")


def attach(
    model: nn.Module | Iterable[nn.Module],
    optimizer: Optimizer | Iterable[Optimizer] | None = None,
    url: str | None = None,
    token: str | None = None,
    project: str | None = None,
    run: str | None = None,
    every: int | None = None,
    overhead_budget: float = 0.01,
    clip: float | AGC | None = None,
    step: int | None = None,
) -> "Agent":
    """Watch the gradients of ``model`` from now on and report them to the server at ``url``.

    Args:
        model: a module or several.
        optimizer: one, several, or None: every optimizer that steps the model's parameters.
        url: the server; None: ``GRADWATCH_URL``, else http://127.0.0.1:8321.
        token: bearer token; None: ``GRADWATCH_TOKEN`` or the file ``GRADWATCH_TOKEN_FILE`` names.
        project: the project of the run; None: ``GRADWATCH_PROJECT``, else ``default``.
        run: a name (None: ``GRADWATCH_RUN``, else the script and the time), or the id of an earlier run (``run-`` and
            16 hexadecimal digits), which is then resumed as a new attempt.
        every: steps between samples; None: ``GRADWATCH_EVERY``, else as ``overhead_budget`` allows.
        overhead_budget: the agent's largest share of the step time, 0.01 for 1%.
        clip: None, or how gradients are clipped adaptively before each step, on every rank: ``gradwatch.AGC(...)``, or
            a number for ``AGC(number)``. An error of the clipping is raised, not swallowed.
        step: optimizer steps that the training has made so far: the next one is counted as ``step + 1``. None: 0 for a
            new run; for a resumed run the step count of a restored optimizer, read now or at its first step. SGD keeps
            no count.

    Returns:
        The agent, already watching. Attached again to the same parameters (in a notebook), it replaces the earlier one.

    Raises:
        SettingsError: an argument cannot be used.
        TypeError: ``model`` is no module, or ``optimizer`` no optimizer.
        ValueError: ``clip`` cannot be right, names parameters that are not there, or is given with an optimizer that
            holds none of the model's parameters.
    """
    options = {"url": url, "token": token, "project": project, "run": run, "every": every, "step": step}
    return attach_restored(model, optimizer, None, clip=clip, overhead_budget=overhead_budget, **options)


def attach_restored(
    model: nn.Module | Iterable[nn.Module],
    optimizer: Optimizer | Iterable[Optimizer] | None,
    checkpoint: str | None,
    *,
    clip: float | AGC | None = None,
    **options: Any,
) -> "Agent":
    """Do what ``attach`` does for a training that a callback saves and restores.

    Args:
        model: a module or several.
        optimizer: as of ``attach``.
        checkpoint: the run that the checkpoint names which the training was restored from: if that run was interrupted,
            it goes on. Empty: it was restored from none that names a run. None: nobody keeps it with checkpoints.
        clip: as of ``attach``.
        options: the others of ``attach``.
    """
    agc = clip if isinstance(clip, AGC) or clip is None else AGC(clip)
    given: Any = model
    models = [given] if not isinstance(given, Iterable) or isinstance(given, nn.Module) else list(given)
    if not models or not all(isinstance(module, nn.Module) for module in models):
        raise TypeError(f"model must be a torch.nn.Module or several of them, not {model!r:.80}")
    return Agent(Session(models, unwrapped(optimizer), resolve(**options), clip=agc, checkpoint=checkpoint))


class Agent:
    """Watches one training. Made by ``attach``; also a context manager that closes itself."""

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def run_id(self) -> str:
        """Return the id of the run, ``run-`` and 16 hexadecimal digits."""
        return self._session.run_id

    @property
    def run_url(self) -> str:
        """Return the address of the run's page."""
        return self._session.run_url

    @property
    def step(self) -> int:
        """Return the number of the last optimizer step."""
        return self._session.step

    @property
    def interval_steps(self) -> int:
        """Return the number of steps between the last two samples, or the fixed interval."""
        return self._session.interval_steps

    def log(self, **scalars: SupportsFloat) -> None:
        """Add numbers to the next step, one for each name: Python's, numpy's, tensors of one element.

        The agent does not wait for the device of a tensor.

        Raises:
            TypeError: a value is neither a number nor a tensor of one element.
        """
        for name, value in scalars.items():
            if isinstance(value, Tensor):
                if value.numel() != 1:
                    raise TypeError(f"log({name}=...) takes one number, not a tensor of shape {tuple(value.shape)}")
                self._session.log(name, value)
            elif isinstance(value, SupportsFloat):
                self._session.log(name, _bounded(value))
            else:
                raise TypeError(f"log({name}=...) takes a number or a tensor of one element, not {value!r:.80}")

    def mirror(self, logger: LoggerName, **options: Any) -> None:
        """Write the numbers of the whole run into the logger that the user already has, too.

        Args:
            logger: ``tensorboard``, ``wandb`` or ``mlflow``.
            options: passed to the logger.

        Raises:
            ValueError: the logger is not known.
            ModuleNotFoundError: it is not installed.
        """
        self._session.add_logger(logger, **options)

    def close(
        self, timeout_seconds: float = CLOSING_SECONDS, *, status: str | None = None, exit_code: int | None = None
    ) -> None:
        """Stop watching, deliver everything measured so far and finish the run; idempotent.

        Documents that the server does not take within the timeout stay in the spool, which the next agent on this
        machine or ``gradwatch flush`` delivers.

        Args:
            timeout_seconds: longest time to wait for the server.
            status: ``completed``, ``failed`` or ``killed``; None: ``completed``. At the end of the interpreter it says
                whether an exception ended it.
            exit_code: exit code of the process, if known.

        Raises:
            ValueError: ``status`` is none of these.
            TypeError: ``exit_code`` is no whole number.
        """
        if status not in (None, *_STATUSES):
            raise ValueError(f"status={status!r} must be one of {', '.join(_STATUSES)}, or None")
        code = None if exit_code is None else operator.index(exit_code)
        self._session.close(time.monotonic() + timeout_seconds, status or "completed", code)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        status, code = shutdown.outcome(error)
        self.close(status=status, exit_code=code)

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _memo: object) -> Self:
        return self  # a copy of a model that holds its agent is not watched; the agent is the same one

    def __reduce__(self) -> tuple[Callable[[str, str], "Agent"], tuple[str, str]]:
        return _retired, (self.run_id, self.run_url)


def _bounded(value: SupportsFloat) -> float:
    try:
        return float(value)
    except OverflowError:  # of an integer without bounds
        return math.inf if cast("int", value) > 0 else -math.inf


def _retired(run_id: str, run_url: str) -> Agent:
    """Return a closed agent that watches nothing, in place of one that was pickled with its model."""
    settings = resolve(url=run_url.removesuffix(f"/runs/{run_id}"), run=run_id, environment={})
    return Agent(Session([], [], settings, retired=True))
