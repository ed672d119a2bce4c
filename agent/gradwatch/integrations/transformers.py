"""The agent in the Hugging Face Trainer: ``Trainer(..., callbacks=[GradwatchCallback()])``."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gradwatch.agent import Agent, attach


class GradwatchCallback(TrainerCallback):
    """Attaches when training begins, closes when it ends.

    Args:
        options: those of ``gradwatch.attach``; the run is named after ``run_name`` of the training arguments.
    """

    def __init__(self, **options: Any) -> None:
        self._options = options
        self.agent: Agent | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Attach to every optimizer that steps the model; a restored trainer goes on counting where it stands."""
        if self.agent is not None:  # of an attempt that ended in an exception, as with auto_find_batch_size
            self.agent.close(timeout_seconds=1.0, status="failed")
        if model is not None:
            known = {"run": args.run_name or None, "step": state.global_step}
            self.agent = attach(model, **{**known, **self._options})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the run."""
        if self.agent is not None:
            self.agent.close()
