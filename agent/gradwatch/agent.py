"""The agent: attaches to a training, measures at the optimizer's steps, hands over to the sender."""

import atexit
import logging
import os
import re
import secrets
import socket
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from gradwatch import taps, wire
from gradwatch.catalog import catalogue
from gradwatch.environment import setting
from gradwatch.governor import Governor
from gradwatch.guard import Guard
from gradwatch.meter import Measured, Meter
from gradwatch.post import Client
from gradwatch.sender import Scalar, Sender
from gradwatch.spool import Spool, folder

log = logging.getLogger("gradwatch")

DEFAULT_URL = "http://127.0.0.1:8321"
RATIO_EPS = 1e-3
_RUN_ID = re.compile(r"[0-9a-f]{16}")
_agents: "weakref.WeakSet[Agent]" = weakref.WeakSet()
_WRAPPED_STEP = Optimizer.profile_hook_step(Optimizer.step).__code__


def attach(
    model: nn.Module | Sequence[nn.Module],
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    url: str | None = None,
    token: str | None = None,
    project: str | None = None,
    run: str | None = None,
    every: int | None = None,
    overhead_budget: float = 0.01,
) -> "Agent":
    """Watch the gradients of a training from here on.

    What is not given comes from the environment (``GRADWATCH_URL``, ``GRADWATCH_TOKEN``, ``GRADWATCH_PROJECT``,
    ``GRADWATCH_RUN``, ``GRADWATCH_EVERY``), then from the defaults.

    Args:
        model: a module or a list of them; of several, names begin with the module's class.
        optimizer: one, a list, or none for every optimizer that steps these parameters.
        url: address of the server; ``http://127.0.0.1:8321`` by default.
        token: ingest token of the server, where it asks for one.
        project: what the run belongs to; ``default`` by default.
        run: a name for the run, or the id of an earlier run that this one resumes.
        every: steps between samples; none: as often as ``overhead_budget`` allows.
        overhead_budget: largest share of the training's time that the agent may take.

    Raises:
        ValueError: an argument cannot be right; the text names it. After that, nothing of the agent raises.
    """
    every = every if every is not None else _every_from_environment()
    if every is not None and every < 1:
        raise ValueError(f"every={every}: the number of steps between samples is at least 1")
    if not 0 < overhead_budget <= 1:
        raise ValueError(f"overhead_budget={overhead_budget}: a share of the step's time, above 0 and at most 1")
    models = [model] if isinstance(model, nn.Module) else list(model)
    if not models or not all(isinstance(entry, nn.Module) for entry in models):
        raise ValueError(f"model: a torch.nn.Module or a list of them, not {type(model).__name__}")
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else None if optimizer is None else list(optimizer)
    return Agent(
        models,
        optimizers,
        url=url or setting("GRADWATCH_URL") or DEFAULT_URL,
        token=token or setting("GRADWATCH_TOKEN"),
        project=project or setting("GRADWATCH_PROJECT") or "default",
        run=run or setting("GRADWATCH_RUN"),
        governor=Governor(every, overhead_budget),
    )


def _every_from_environment() -> int | None:
    given = setting("GRADWATCH_EVERY")
    if given is None:
        return None
    if not given.isdecimal():
        raise ValueError(f"GRADWATCH_EVERY={given!r} is not a number of steps")
    return int(given)


@dataclass
class _Clipped:
    """What ``clip_grad_norm_`` did before this step."""

    parameters: set[int]
    max_norm: float
    total_norm: Tensor


@dataclass
class _Round:
    """One step as it comes together: every optimizer that takes part steps once."""

    step: int
    sampled: bool
    started: float
    optimizers: list[int] = field(default_factory=list)
    covered: set[int] = field(default_factory=set)
    """Ids of the parameters that have been measured."""
    measured: list[Measured] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    clipped: list[_Clipped] = field(default_factory=list)
    scalars: dict[str, float] = field(default_factory=dict)
    agent_seconds: float = 0.0


class Agent:
    """Watches one training; made by ``attach``. A context manager that closes at its end."""

    run_id: str
    run_url: str
    outcome: tuple[str, int | None] = ("completed", None)
    """How the run ends when the agent is closed: status and exit code."""

    def __init__(
        self,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer] | None,
        *,
        url: str,
        token: str | None,
        project: str,
        run: str | None,
        governor: Governor,
    ) -> None:
        self._attempt = time.time_ns() // 1_000_000
        resumed = run is not None and _RUN_ID.fullmatch(run)
        self.run_id = run if run is not None and resumed else secrets.token_hex(8)
        self.run_url = f"{url.rstrip('/')}/runs/{self.run_id}"
        self._tracked = catalogue(models)
        self._ids = {id(entry.parameter) for entry in self._tracked}
        self._meter = Meter(self._tracked, RATIO_EPS)
        self._governor = governor
        self._optimizers = None if optimizers is None else weakref.WeakSet(optimizers)
        self._known: weakref.WeakKeyDictionary[Optimizer, tuple[int, bool]] = weakref.WeakKeyDictionary()
        self._active = True
        self._step = 0
        self._emitted = 0
        self._round: _Round | None = None
        self._clipped: list[_Clipped] = []
        self._scalars: dict[str, float] = {}
        self._pending: list[Callable[[], bool]] = []
        self._guard = Guard(self._disarm, reraise=os.environ.get("GRADWATCH_RERAISE") == "1")
        spool = Spool.of(folder(), url, self.run_id, self._attempt)
        self._sender = Sender(Client(url, token), spool, self.run_id, self._attempt)
        self._sender.put(
            wire.Registration(
                id=self.run_id,
                project=project,
                name="" if resumed else run or _default_name(),
                parameters=[entry.describe(depth) for depth, entry in enumerate(self._tracked)],
                started_at=time.time(),
                attempt=self._attempt,
                attributes=_attributes(),
            )
        )
        taps.listen(self)
        atexit.register(self.close)
        _agents.add(self)

    def log(self, **scalars: float | Tensor) -> None:
        """Add scalars, such as ``loss=...``, to the next step; a tensor is read without waiting for its device."""
        with self._guard("taking scalars"):
            for name, value in scalars.items():
                if isinstance(value, Tensor):
                    self._read(name, value, self._step + 1)
                else:
                    self._scalars[name] = float(value)

    def close(self, timeout_seconds: float = 10) -> None:
        """Deliver what is left, for at most this long, and detach; what remains waits on disk. Idempotent."""
        self._end(timeout_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.outcome = ("failed", None)
        self._end(10)

    def _end(self, timeout_seconds: float) -> None:
        if self._sender.closed:
            return
        self._active = False
        taps.ignore(self)
        atexit.unregister(self.close)
        with self._guard("closing"):
            if self._round is not None:
                self._emit(self._round)
            for pending in self._pending:
                deadline = time.monotonic() + timeout_seconds
                while not pending() and time.monotonic() < deadline:
                    time.sleep(0.001)
            status, exit_code = self.outcome
            self._sender.put(wire.End(at=time.time(), status=status, exit_code=exit_code))
            self._sender.errors = self._guard.errors
        self._sender.close(timeout_seconds)

    def _disarm(self, reason: str) -> None:
        self._active = False
        self._sender.put(wire.Event(step=self._step, at=time.time(), kind="disarmed", message=reason[:2000]))

    def forget(self) -> None:
        """In a forked child: the sender's thread is not here, and the parent goes on reporting."""
        self._active = False
        self._sender.abandon()

    # What the taps tell

    def on_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Measure before an optimizer steps; with a closure, after the closure's first evaluation."""
        if not self._active:
            return None
        with self._guard("taking note of a step"):
            if not self._watches(optimizer) or _is_nested(optimizer):
                return None
            closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
            if closure is None or not callable(closure):
                self._before(optimizer)
                return None
            wrapped = self._after_first_evaluation(optimizer, closure)
            if "closure" in kwargs:
                return args, kwargs | {"closure": wrapped}
            return (args[0], wrapped, *args[2:]), kwargs

    def on_backward(self, loss: Tensor) -> None:
        """Keep the loss of this step; the last one where there are several."""
        if self._active:
            with self._guard("reading the loss"):
                self._read("loss", loss, self._step + 1)

    def on_clip(self, parameters: list[Tensor], max_norm: float, total_norm: Tensor) -> None:
        """Keep the norm that clipping returns: what is measured afterwards is after clipping."""
        if self._active:
            with self._guard("reading the norm that clipping returned"):
                chosen = {id(parameter) for parameter in parameters}
                if chosen & self._ids:
                    self._clipped.append(_Clipped(chosen, float(max_norm), total_norm.detach()))
                    self._read("clip_norm", total_norm, self._step + 1)

    def _watches(self, optimizer: Optimizer) -> bool:
        if self._optimizers is not None:
            return optimizer in self._optimizers
        size = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._known.get(optimizer)
        if known is None or known[0] != size:
            steps = any(id(parameter) in self._ids for group in optimizer.param_groups for parameter in group["params"])
            known = self._known[optimizer] = (size, steps)
        return known[1]

    def _after_first_evaluation(self, optimizer: Optimizer, closure: Callable[..., Any]) -> Callable[..., Any]:
        evaluated = False

        def watched(*args: Any, **kwargs: Any) -> Any:
            nonlocal evaluated
            loss = closure(*args, **kwargs)
            if not evaluated and self._active:
                evaluated = True
                with self._guard("taking note of a step"):
                    self._before(optimizer)
            return loss

        return watched

    # One step

    def _before(self, optimizer: Optimizer) -> None:
        started = time.perf_counter()
        current = self._round
        if current is None or id(optimizer) in current.optimizers:
            current = self._next_round(current, started)
        current.optimizers.append(id(optimizer))
        current.clipped += self._clipped
        current.scalars |= self._scalars
        self._clipped, self._scalars = [], {}
        if current.sampled:
            self._measure(current, optimizer)
        self._pending = [pending for pending in self._pending if not pending()]
        spent = time.perf_counter() - started
        current.agent_seconds += spent
        self._governor.spent_seconds += spent
        if current.sampled and len(current.covered) >= len(self._ids):
            self._emit(current)

    def _next_round(self, last: _Round | None, now: float) -> _Round:
        if last is not None:
            self._emit(last)
            self._governor.stepped(now - last.started)
        self._step += 1
        self._round = _Round(self._step, self._governor.due(self._step, now), now)
        return self._round

    def _measure(self, current: _Round, optimizer: Optimizer) -> None:
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} & self._ids
        chosen = own - current.covered
        if chosen:
            scale = getattr(optimizer, "grad_scale", None)
            everything = len(chosen) == len(self._ids)
            current.measured += self._meter.measure(None if everything else chosen, scale)
            current.covered |= chosen
        current.learning_rates += [float(group["lr"]) for group in optimizer.param_groups if _is_plain(group.get("lr"))]

    def _emit(self, current: _Round) -> None:
        """Hand a complete step over; its numbers are read when they have arrived."""
        if self._round is not current or current.step == self._emitted:
            return
        self._emitted = current.step
        for name, value in current.scalars.items():
            self._sender.put(Scalar(name, current.step, value))
        if not current.sampled:
            return
        at = time.time()
        now = time.perf_counter()
        self._governor.sampled(current.step, now, current.agent_seconds)
        scalars: dict[str, wire.Number] = {
            "agent_seconds": current.agent_seconds,
            "interval_steps": float(self._governor.interval_steps),
            "overhead_ratio": self._governor.overhead_ratio,
            "step_seconds": self._governor.step_seconds,
        }
        for index, rate in enumerate(dict.fromkeys(current.learning_rates)):
            scalars["learning_rate" if index == 0 else f"learning_rate.{index}"] = rate

        def arrived() -> bool:
            if not all(measured.ready() for measured in current.measured):
                return False
            self._sender.put(lambda: self._sample(current, at, scalars))
            return True

        if not arrived():
            self._pending.append(arrived)

    def _sample(self, current: _Round, at: float, scalars: dict[str, wire.Number]) -> wire.Sample:
        """Put a sample together, on the sender's thread."""
        statistics = self._meter.blank()
        for measured in current.measured:
            measured.fill(statistics)
        known = statistics["grad_norm"] != wire.MISSING
        for clipped in current.clipped:
            self._undo_clipping(statistics, clipped, known)
        norms = statistics["grad_norm"][known].astype(np.float64)
        scalars["global_grad_norm"] = float(np.sqrt(np.square(norms).sum()))
        if "clipped_grad_norm" in statistics:
            after = statistics["clipped_grad_norm"][known].astype(np.float64)
            scalars["clipped_global_grad_norm"] = float(np.sqrt(np.square(after).sum()))
        return wire.Sample(step=current.step, at=at, statistics=statistics, scalars=scalars)

    def _undo_clipping(
        self,
        statistics: dict[wire.Statistic, wire.Vector],
        clipped: _Clipped,
        known: np.ndarray[Any, np.dtype[np.bool_]],
    ) -> None:
        """Turn what was measured after ``clip_grad_norm_`` back into what it was before."""
        statistics.setdefault("clipped_grad_norm", statistics["grad_norm"].copy())
        total = float(clipped.total_norm)
        if not np.isfinite(total):
            return
        factor = max(1.0, (total + 1e-6) / clipped.max_norm) if clipped.max_norm > 0 else 1.0
        ours = np.array([id(entry.parameter) in clipped.parameters for entry in self._tracked]) & known
        for name in ("grad_norm", "max_unit_ratio"):
            statistics[name][ours] *= np.float32(factor)

    def _read(self, name: str, value: Tensor, step: int) -> None:
        """Keep a scalar tensor: on the CPU its number is there, elsewhere it is copied and read when it has arrived."""
        scalar = value.detach().reshape(())
        if scalar.device.type == "cpu":
            self._scalars[name] = float(scalar.float().numpy())
            return
        host = torch.empty((), dtype=torch.float32, pin_memory=True)
        host.copy_(scalar, non_blocking=True)
        done = torch.Event(scalar.device.type)
        done.record()

        def arrived() -> bool:
            if not done.query():
                return False
            self._sender.put(Scalar(name, step, float(host.numpy())))
            return True

        self._pending.append(arrived)


def _forget_all() -> None:
    for agent in list(_agents):
        agent.forget()


os.register_at_fork(after_in_child=_forget_all)


def _is_plain(rate: object) -> bool:
    return isinstance(rate, float | int) or (isinstance(rate, Tensor) and rate.device.type == "cpu")


def _is_nested(optimizer: Optimizer) -> bool:
    """Return whether this step is called from within a step of the same optimizer: ``super().step()``."""
    outermost = True
    frame: FrameType | None = sys._getframe(2)  # noqa: SLF001  # the one way to know what called
    while frame is not None:
        if frame.f_code is _WRAPPED_STEP:
            if not outermost and frame.f_locals.get("self") is optimizer:
                return True
            outermost = False
        frame = frame.f_back
    return False


def _default_name() -> str:
    script = Path(sys.argv[0]).stem if sys.argv and sys.argv[0] else ""
    return f"{script or 'run'}-{datetime.now().astimezone():%Y%m%d-%H%M%S}"


def _attributes() -> dict[str, str]:
    return {
        "host": socket.gethostname(),
        "python": sys.version.split()[0],
        "torch": str(torch.__version__),
        "gradwatch": metadata.version("gradwatch"),
        "command": " ".join(sys.argv)[:500],
    }
