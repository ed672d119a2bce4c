"""The watched models: finding new parameters, registering them, and whether this rank can measure them."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from gradwatch.clipping.agc import AGC
from gradwatch.clipping.classifier import SEARCHES, SEARCHES_TO_CLIP, ClassifierFinder
from gradwatch.clipping.executor import AgcExecutor
from gradwatch.model.flat_parameters import uses_fsdp1
from gradwatch.model.registry import ParameterRegistry
from gradwatch.monitor.notices import Notices
from gradwatch.ranks.exchange import RankExchange, incomplete_reason
from gradwatch.ranks.holdings import RegisteredParameters, holdings_of, peers_of


class WatchedModels:
    """The models of one training, their parameters and their classifier.

    Args:
        models: the watched models.
        clip: how gradients are clipped adaptively; None: not at all.
        ranks: the ranks of a sharded training; None where this rank measures alone.
        notices: tells the user.
        put: takes the registration of the parameters.
    """

    def __init__(
        self,
        models: Sequence[nn.Module],
        clip: AGC | None,
        ranks: RankExchange | None,
        notices: Notices,
        *,
        put: Callable[[RegisteredParameters], None],
    ) -> None:
        self.parameters = ParameterRegistry(models, None if clip is None else clip.expert_indices)
        self.classifier = ClassifierFinder(self.parameters.find, SEARCHES if clip is None else SEARCHES_TO_CLIP)
        self.clipper = None if clip is None else AgcExecutor(clip, self.classifier)
        self.parts_only = ""
        """Why nothing is measured: this rank holds only parts of the parameters, and no other measures the rest."""
        self._ranks = ranks
        self._notices = notices
        self._put = put
        self._registers = False

    def search_classifier(self, losses: Sequence[Tensor]) -> None:
        """Search the graph of a loss for the classifier, on every rank that clips."""
        self.classifier.searches_left -= 1
        if self.parameters.sharded:
            self.parameters.note_unsharded()
        self.classifier.search(losses)

    def start_registering(self) -> None:
        """Register the parameters, now and whenever they change; learn their depths from the next backward pass."""
        self._registers = True
        self.register()
        self.parameters.await_order()
        if self.parts_only:
            self._notices.report("not_measured", self.parts_only)

    def _tell_unreadable(self) -> None:
        """Name the parameters that cannot be measured to the user, each once."""
        new, self.parameters.newly_unreadable = self.parameters.newly_unreadable, []
        self._notices.unreadable([self.parameters.watched[index] for index in sorted(new)])

    def stop_registering(self) -> None:
        """Stop registering parameters."""
        self._registers = False

    def register(self) -> None:
        """Tell the server of the parameters."""
        if self._registers:
            if self.parameters.newly_unreadable:
                self._tell_unreadable()
            watched, depths = self.parameters.described()
            held, peers = None, []
            if self._ranks is not None:
                rank = self._ranks.rank
                models = self.parameters.models
                held, peers = holdings_of(watched, models, rank), peers_of(models, rank)
            self._put(RegisteredParameters(watched, depths, held, peers))

    def discover(self) -> bool:
        """Look for parameters that are not known yet; return whether there were any."""
        new = self.parameters.discover()
        if new and self.clipper is not None:
            self.clipper.find_excluded(self.parameters.watched)
        return new

    def note_not_measured(self, reason: str) -> None:
        """Tell the user that something is not measured, unless nothing is anyway."""
        if not self.parts_only:
            self._notices.not_measured(reason)

    def check_parts(self, *, watching: bool) -> bool:
        """Return whether this rank could measure only its part of the parameters, so that nothing is measured.

        Raises:
            NotImplementedError: clipping is on, and the gradients cannot be clipped.
        """
        if self.parts_only:
            return True
        models = self.parameters.models
        if self.clipper is not None and uses_fsdp1(models):
            text = "FullyShardedDataParallel (FSDP1) cuts through the units of parameters"
            raise NotImplementedError(f"{text}, and AGC cannot clip them: use fully_shard (FSDP2)")
        self.parts_only = text = incomplete_reason(models, self._ranks)
        if not text:
            return False
        if watching:
            self._notices.parts_only(text)
        return True
