"""The callback for the Hugging Face Trainer: ``Trainer(..., callbacks=[GradwatchCallback()])``."""

from typing import Any

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gradwatch.agent import Agent, attach


class GradwatchCallback(TrainerCallback):
    """Attaches an agent when training begins, and closes it when training ends.

    Args:
        options: those of ``gradwatch.attach``; ``run`` is ``run_name`` of the training arguments unless given, and
            ``step`` is taken from the trainer.
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
        """Attach to every optimizer that steps the model; the step of a restored trainer is continued."""
        if self.agent is not None:  # an earlier attempt ended in an exception, as with auto_find_batch_size
            self.agent.close(timeout_seconds=1.0, status="failed")
        if model is not None:
            known = {"run": args.run_name or None, "step": state.global_step}
            self.agent = attach(model, **{**known, **self._options})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the agent with the status ``completed``."""
        if self.agent is not None:
            self.agent.close()
