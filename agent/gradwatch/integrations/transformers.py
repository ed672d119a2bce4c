"""The callback for the Hugging Face Trainer: ``Trainer(..., callbacks=[GradwatchCallback()])``."""

from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from gradwatch.agent import Agent, attach_restored

_RUN_FILE: Final = "gradwatch_run.txt"
"""File in a checkpoint's folder that names the run."""


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
            self.agent = attach_restored(model, None, _run_of_checkpoint(args, state), **{**known, **self._options})

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the run beside the checkpoint, so that it goes on where the training is interrupted and restored."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if self.agent is not None and state.is_world_process_zero and folder.is_dir():
            with suppress(OSError):
                (folder / _RUN_FILE).write_text(f"{self.agent.run_id}\n", encoding="utf-8")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the agent with the status ``completed``."""
        if self.agent is not None:
            self.agent.close()


def _run_of_checkpoint(args: TrainingArguments, state: TrainerState) -> str:
    """Return the run that the checkpoint names which a trainer was restored from; empty if there is none."""
    if not state.global_step:
        return ""
    folders = [f"{args.output_dir}/checkpoint-{state.global_step}"]
    given: object = args.resume_from_checkpoint  # True stands for the last one in ``output_dir``
    if given and isinstance(given, str):
        folders.insert(0, given)
    for folder in folders:
        with suppress(OSError, ValueError):  # no such file, no text, no path
            return Path(folder, _RUN_FILE).read_text(encoding="utf-8").strip()
    return ""
