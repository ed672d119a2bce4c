"""A tiny GPT, trained from nothing by the Hugging Face Trainer with the callback.

``python examples/transformers_trainer.py``, with ``gradwatch serve`` running.
Look at: the depth profile. No layer is decades away from its neighbours.
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from gradwatch.integrations.transformers import GradwatchCallback


def main() -> None:
    """Train 40 steps on a text that repeats itself."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=3, n_head=2))
    texts = [{"input_ids": (ids := torch.arange(32) * step % 64), "labels": ids} for step in range(1, 65)]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            run_name="transformers",
            max_steps=40,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        callback = GradwatchCallback(project="examples")
        Trainer(model=model, args=arguments, train_dataset=texts, callbacks=[callback]).train()


if __name__ == "__main__":
    main()
