"""Joining the ranks of a training on their collectors' threads: rank 0 reports for all, the others tell it their parts.

A rank first tells what it holds of the model. Rank 0 works out from that who reports what, registers the parameters of
all ranks, and asks for what is needed: ranks that hold only copies stop measuring.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from gradwatch import wire
from gradwatch.ranks.bursts import LOOK_SECONDS, AgreedBursts
from gradwatch.ranks.exchange import Asked, LossSeries, RankExchange, StoreGone
from gradwatch.ranks.holdings import Holdings, RegisteredParameters
from gradwatch.ranks.parts import JoinedStatistics, RankPart
from gradwatch.ranks.whole_model import NOWHERE, WholeModel
from gradwatch.samples.builder import Draft, SampleBuilder

_POLL_SECONDS: Final = 0.1
"""Pause while the parts of other ranks are waited for."""
PARTS_TIMEOUT_SECONDS: Final = 30.0
"""How long rank 0 waits for the parts of a sample, and for ranks that hold parts of the model."""
_COPIES_TIMEOUT_SECONDS: Final = 10.0
"""How long it waits for ranks that are likely to hold copies."""
_LAST_PARTS_SECONDS: Final = 5.0
"""Longest wait for other ranks when the run ends."""
_LAST_COPIES_SECONDS: Final = 1.0
_LATE_SECONDS: Final = 10.0
"""Time between two looks for ranks that were late."""
_LOSSES_SECONDS: Final = 1.0
"""Time between two documents with losses."""
_MOST_LOSSES: Final = 20_000
"""LossSeries that wait until rank 0 has asked for them; the oldest are dropped."""
_MOST_REFUSED: Final = 3
"""Reasons why something is not measured that are told."""


class Joining(Protocol):
    """What a collector needs of the other ranks."""

    def register(self, parameters: RegisteredParameters) -> None:
        """Take the parameters of this rank."""

    def take(self, step: int, loss: float | None, draft: Draft | None) -> None:
        """Take the loss of a step, and its sample where it was sampled."""

    def poll(self, *, wait: bool) -> None:
        """Do what can be done; with ``wait``, which is for the end of the run, give the other ranks some seconds."""

    @property
    def poll_seconds(self) -> float:
        """Time after which ``poll`` has to look again for something of the other ranks; infinite where none comes."""

    bursts: AgreedBursts
    """The bursts of samples that the ranks take together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JoiningCallbacks:
    """Callbacks of a collector that joins ranks."""

    registered: Callable[[Sequence[wire.Parameter]], None]
    """Takes the parameters of the whole model."""
    finished: Callable[[Draft, JoinedStatistics | None], None]
    """Takes a sample whose parts are complete; without joined statistics where rank 0 measures everything."""
    loss: Callable[[int, float], None]
    """Takes the loss of a step that another rank has."""
    not_measured: Callable[[str], None]
    """Takes the reason why something is not measured."""
    needless: Callable[[], None]
    """Called on another rank if nothing of it is needed, on rank 0 if nothing of the others is."""
    agreed: Callable[[int], None]
    """Takes the first step of a burst of samples that all ranks take."""


def joining_for(exchange: RankExchange, builder: SampleBuilder, callbacks: JoiningCallbacks) -> Joining:
    """Return the side of this rank."""
    if exchange.rank:
        return OtherRank(exchange, builder, callbacks)
    return ReportingRank(exchange, builder, callbacks)


class ReportingRank:
    """Rank 0: joins the parts of all ranks.

    Args:
        exchange: passes the documents of the other ranks.
        builder: computes statistics.
        callbacks: those of the collector.
    """

    def __init__(self, exchange: RankExchange, builder: SampleBuilder, callbacks: JoiningCallbacks) -> None:
        self._exchange = exchange
        self._builder = builder
        self._callbacks = callbacks
        self.bursts = AgreedBursts(exchange, callbacks.agreed)
        self._whole = WholeModel()
        self._holdings: dict[int, Holdings] = {}
        self._versions: dict[int, int] = {}
        """Rank -> version of what it says that it holds."""
        self._missing = set(range(1, exchange.size))
        """Ranks that have not said yet what they hold."""
        self._resolved = False
        self._asked: Asked | None = None
        self._asked_times = 0
        self._refused: list[str] = []
        self._drafts: deque[tuple[Draft, float]] = deque()
        """Samples that wait for the parts of the other ranks, each since a monotonic time."""
        self._loss_rank: int | None = None
        """The rank whose losses are those of the run: this one if it has any, else the last stage's."""
        self._since = time.monotonic()
        self._looked = 0.0
        self._losses_taken = 0.0
        self._store_is_gone = False

    def register(self, parameters: RegisteredParameters) -> None:
        """Take the parameters of this rank."""
        self._holdings[0] = parameters.holdings()
        if self._resolved:
            self._resolve()

    def take(self, _step: int, loss: float | None, draft: Draft | None) -> None:
        """Take the loss of a step, and its sample where it was sampled."""
        if loss is not None:
            self._loss_rank = 0
        if draft is not None:
            self._drafts.append((draft, time.monotonic()))

    def poll(self, *, wait: bool) -> None:
        """Finish the samples whose parts are complete; drop those whose parts will not come."""
        if 0 not in self._holdings:
            return
        latest = time.monotonic() + _LAST_PARTS_SECONDS if wait else None
        if not self._store_is_gone:
            try:
                self._meet(latest)
                self._join(latest)
                if self._resolved:
                    self._take_losses(latest)
                self.bursts.poll()
            except StoreGone:
                self._go_on_without_others()
        if self._store_is_gone:
            self._finish_alone()

    @property
    def poll_seconds(self) -> float:
        """Time after which ``poll`` has to look again for something of the other ranks."""
        asked = self._asked
        if self._store_is_gone or (asked is not None and not asked.parts and not asked.losses):
            return math.inf
        at_any_time = self._drafts or not self._resolved or (asked is not None and asked.losses)
        return _POLL_SECONDS if at_any_time else LOOK_SECONDS

    @property
    def _others(self) -> list[int]:
        """Return the other ranks whose parts are needed."""
        return [] if self._asked is None else self._asked.parts

    def _go_on_without_others(self) -> None:
        """Go on where the store is gone: what other ranks hold is not measured any more."""
        self._store_is_gone = True
        self._missing.clear()
        if self._exchange.divided or self._others:
            self._refuse(["the store of the process group is gone: other ranks' parts are not measured any more"])
        if not self._resolved:
            self._whole.resolve(self._holdings)
            self._resolved = True
            self._callbacks.registered(self._whole.parameters)

    def _finish_alone(self) -> None:
        """Finish the samples for which nobody else is needed; drop the others."""
        while self._drafts:
            draft, _ = self._drafts.popleft()
            if not self._others and self._is_whole:
                self._callbacks.finished(draft, None)

    @property
    def _is_whole(self) -> bool:
        """Return whether rank 0 measures everything by itself."""
        reported = self._whole.reported.get(0)
        return (
            reported is not None and bool((reported != NOWHERE).all()) and len(reported) == len(self._whole.parameters)
        )

    # Who holds what

    def _meet(self, latest: float | None) -> None:
        """Take what the other ranks say that they hold; work out who reports what once all have said it."""
        now = time.monotonic()
        if not self._missing or (self._resolved and latest is None and now - self._looked < _LATE_SECONDS):
            return
        self._looked = now
        divided = self._exchange.divided
        until = now if latest is None else latest if divided else min(latest, now + _LAST_COPIES_SECONDS)
        found = self._find_missing()
        while self._missing and not self._resolved and time.monotonic() < until:
            time.sleep(0.01)
            found |= self._find_missing()
        waited = now - self._since > (PARTS_TIMEOUT_SECONDS if divided else _COPIES_TIMEOUT_SECONDS)
        if found if self._resolved else not self._missing or waited or latest is not None:
            self._resolve()

    def _find_missing(self) -> bool:
        """Look for what ranks say that have said nothing yet; return whether any of them does now."""
        found = [rank for rank in sorted(self._missing) if self._update(rank)]
        self._missing.difference_update(found)
        return bool(found)

    def _update(self, rank: int) -> bool:
        """Take the latest version of what another rank says that it holds; return whether it says anything."""
        while True:
            version = self._versions.get(rank, -1) + 1
            holdings = self._exchange.holdings(rank, version)
            if holdings is None:
                return rank in self._holdings
            self._holdings[rank], self._versions[rank] = holdings, version

    def _resolve(self) -> None:
        """Work out who reports what, register the parameters of all ranks, and ask the other ranks for their parts."""
        self._resolved = True
        self._whole.resolve(self._holdings)
        self._refuse(self._whole.refused)
        self._callbacks.registered(self._whole.parameters)
        losses = [rank for rank in self._whole.stage_ranks if rank]
        asked = Asked([rank for rank in self._whole.reporting if rank], losses)
        if asked != self._asked and not self._store_is_gone:
            self._exchange.ask(self._asked_times, asked)
            self._asked_times += 1
            self._asked = asked
            if not asked.parts and not asked.losses:
                self._callbacks.needless()

    def _refuse(self, reasons: Sequence[str]) -> None:
        for reason in reasons:
            if reason not in self._refused and len(self._refused) < _MOST_REFUSED:
                self._refused.append(reason)
                self._callbacks.not_measured(reason)

    # Samples

    def _join(self, latest: float | None) -> None:
        while self._drafts and self._resolved:
            draft, since = self._drafts[0]
            step, others = draft.record.step, self._others
            # Both are asked before the parts are collected: if a later step is complete, or all ranks have ended, and
            # this step is not complete, it never will be.
            never = len(self._drafts) > 1 and self._exchange.all_published(self._drafts[1][0].record.step, others)
            never = never or bool(latest is not None and others and self._exchange.have_ended(others))
            parts = self._exchange.collect(step, others)
            now = time.monotonic()
            if parts is not None:
                self._drafts.popleft()
                self._finish(draft, parts)
            elif never or now - since > PARTS_TIMEOUT_SECONDS or (latest is not None and now > latest):
                self._drafts.popleft()
            elif latest is not None:
                time.sleep(0.01)
            else:
                return

    def _finish(self, draft: Draft, parts: Mapping[int, tuple[int, RankPart]]) -> None:
        # 1. Parts may be of parameters that are not known yet.
        if any(version > self._versions[rank] for rank, (version, _) in parts.items()):
            for rank in parts:
                self._update(rank)
            self._resolve()
        if self._others:
            self._take_losses(None, at_once=True)
        # 2. Join what was measured.
        if not self._others and self._is_whole:
            self._callbacks.finished(draft, None)
        elif self._whole.parameters and 0 in self._whole.reporting:
            both = {0: self._builder.part(draft)} | {rank: part for rank, (_, part) in parts.items()}
            self._callbacks.finished(draft, self._builder.join(both, self._whole))

    # LossSeries

    def _take_losses(self, latest: float | None, *, at_once: bool = False) -> None:
        """Take the losses of steps for which this rank has none."""
        asked = [] if self._asked is None else self._asked.losses
        now = time.monotonic()
        if not asked or (latest is None and not at_once and now - self._losses_taken < _LOSSES_SECONDS):
            return
        self._losses_taken = now
        while latest is not None and time.monotonic() < latest and not self._exchange.have_ended(asked):
            time.sleep(0.01)
        for rank in reversed(asked):
            for losses in self._exchange.take_losses(rank):
                if self._loss_rank is None:
                    self._loss_rank = rank
                if self._loss_rank == rank:
                    for step, value in zip(losses.steps, losses.values, strict=True):
                        self._callbacks.loss(step, value)


class OtherRank:
    """Any rank but rank 0: tells rank 0 what it holds, and its parts of samples.

    Args:
        exchange: passes its documents to rank 0.
        builder: computes its parts.
        callbacks: those of the collector.
    """

    def __init__(self, exchange: RankExchange, builder: SampleBuilder, callbacks: JoiningCallbacks) -> None:
        self._exchange = exchange
        self._builder = builder
        self._callbacks = callbacks
        self.bursts = AgreedBursts(exchange, callbacks.agreed)
        self._version = -1
        self._asked: Asked | None = None
        self._asked_times = 0
        self._losses: deque[tuple[int, float]] = deque(maxlen=_MOST_LOSSES)
        """(step, loss) that rank 0 was not told yet."""
        self._losses_since = 0.0
        self._over = False
        """Whether nothing of this rank is needed any more."""

    def register(self, parameters: RegisteredParameters) -> None:
        """Take the parameters of this rank."""
        self._version += 1
        version, holdings = self._version, parameters.holdings()
        self._try(lambda: self._exchange.declare(version, holdings))

    def take(self, step: int, loss: float | None, draft: Draft | None) -> None:
        """Take the loss of a step, and its sample where it was sampled."""
        if self._over:
            return
        if loss is not None:
            self._losses.append((step, loss))
        if draft is not None:
            self._try(lambda: self._publish(draft))

    def poll(self, *, wait: bool) -> None:
        """Look what rank 0 asks for; with ``wait``, tell everything that is left, and that this rank has ended."""
        if not self._over:
            self._try(self._look if not wait else self._end)

    @property
    def poll_seconds(self) -> float:
        """Time after which ``poll`` has to look again: rank 0 may ask, or name a burst, or is to be told losses."""
        if self._over:
            return math.inf
        return _POLL_SECONDS if self._asked is None or self._losses else LOOK_SECONDS

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except StoreGone:  # rank 0 has ended, which nobody here can mend
            self._stop()

    def _publish(self, draft: Draft) -> None:
        self._look_what_is_asked()
        self._tell_losses()
        if self._asked is None or self._exchange.rank in self._asked.parts:
            self._exchange.publish(draft.record.step, self._version, self._builder.part(draft))

    def _look(self) -> None:
        if self._asked is None and self._version >= 0:
            self._look_what_is_asked()
        if self._losses and time.monotonic() - self._losses_since > _LOSSES_SECONDS:
            self._tell_losses()
        if not self._over:
            self.bursts.poll()

    def _end(self) -> None:
        self._look_what_is_asked()
        self._tell_losses(unasked=True)
        self._exchange.end()
        self._over = True

    def _look_what_is_asked(self) -> None:
        while (asked := self._exchange.asked(self._asked_times)) is not None:
            self._asked, self._asked_times = asked, self._asked_times + 1
        if self._asked is not None and self._exchange.rank not in (*self._asked.parts, *self._asked.losses):
            self._stop()

    def _tell_losses(self, *, unasked: bool = False) -> None:
        if self._asked is None and not unasked:
            return
        if self._losses and (self._asked is None or self._exchange.rank in self._asked.losses):
            steps, values = zip(*self._losses, strict=True)
            self._exchange.tell_losses(LossSeries(list(steps), list(values)))
        self._losses.clear()
        self._losses_since = time.monotonic()

    def _stop(self) -> None:
        if not self._over:
            self._over = True
            self._losses.clear()
            self._callbacks.needless()
