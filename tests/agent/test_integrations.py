"""The libraries themselves doing a real fit, and what the agent saw of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from gradwatch.integrations.accelerate import watch
from gradwatch.integrations.lightning import GradwatchCallback as LightningCallback
from gradwatch.integrations.transformers import GradwatchCallback as TrainerCallback

from .conftest import Server

lightning = pytest.importorskip("lightning.pytorch")


class Points(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor([1.0])}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 1)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        out: Tensor = self.inner(x)
        return {"loss": (out - (labels if labels is not None else 0)).square().mean(), "logits": out}


@pytest.mark.parametrize("automatic", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_lightning(server: Server, tmp_path: Path, automatic: bool) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.automatic_optimization = automatic

        def training_step(self, batch: dict[str, Tensor]) -> Tensor | None:
            loss: Tensor = self.net(**batch)["loss"]
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        gradient_clip_val=0.5 if automatic else None,
        callbacks=[LightningCallback(url=server.url, every=1)],
    )
    trainer.fit(Module(), DataLoader(Points(), batch_size=3))
    assert server.names == ["net.inner.weight", "net.inner.bias"]
    assert [sample.step for sample in server.samples] == [1, 2, 3, 4]
    if automatic:
        assert server.scalar("clipped_global_grad_norm") == pytest.approx(0.5, rel=1e-4)
        assert server.scalar("global_grad_norm_limit") == 0.5
        assert server.scalar("global_grad_norm") == pytest.approx(server.trail("clip_norm")[4], rel=1e-5)
        assert server.scalar("global_grad_norm") > 1
    assert server.batches[-1].end is not None


@pytest.mark.parametrize("optimizers", [1, 2])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.filterwarnings("ignore")
def test_a_lightning_training_that_is_resumed_counts_on(
    server: Server, tmp_path: Path, kind: Any, optimizers: int
) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(Net() for _ in range(optimizers))
            self.automatic_optimization = optimizers == 1

        def training_step(self, batch: dict[str, Tensor]) -> Tensor | None:
            losses: list[Tensor] = [net(**batch)["loss"] for net in self.nets]
            if self.automatic_optimization:
                return losses[0]
            for optimizer, loss in zip(self.optimizers(), losses, strict=True):
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return None

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [kind(net.parameters(), lr=1e-3) for net in self.nets]

    def fit(epochs: int, run: str | None, checkpoint: Path | None) -> tuple[str, list[int]]:
        seen = len(server.batches)
        callback = LightningCallback(url=server.url, every=1, run=run)
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=[callback],
        )
        trainer.fit(Module(), DataLoader(Points(), batch_size=3), ckpt_path=checkpoint)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        assert callback.agent is not None
        return callback.agent.run_id, [sample.step for batch in server.batches[seen:] for sample in batch.samples]

    run, steps = fit(1, None, None)
    assert steps == [1, 2, 3, 4]
    resumed, steps = fit(2, run, tmp_path / "last.ckpt")
    assert resumed == run
    # Lightning adds up what its optimizers did; SGD does not tell its own part, and a gap hides nothing.
    first = 9 if optimizers == 2 and kind is torch.optim.SGD else 5
    assert steps == [first, first + 1, first + 2, first + 3]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
@pytest.mark.filterwarnings("ignore")
def test_a_trainer_that_is_resumed_counts_on(server: Server, tmp_path: Path, optimizer: str) -> None:
    from transformers import Trainer, TrainingArguments

    def train(steps: int, run: str | None, *, resume: bool) -> tuple[str, list[int]]:
        seen = len(server.batches)
        callback = TrainerCallback(url=server.url, every=1, run=run)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=2,
            optim=optimizer,
            report_to=[],
            use_cpu=True,
            save_steps=4,
            logging_strategy="no",
            disable_tqdm=True,
        )
        Trainer(model=Net(), args=arguments, train_dataset=Points(), callbacks=[callback]).train(
            resume_from_checkpoint=resume
        )
        assert callback.agent is not None
        return callback.agent.run_id, [sample.step for batch in server.batches[seen:] for sample in batch.samples]

    run, steps = train(4, "first", resume=False)
    assert steps == [1, 2, 3, 4]
    assert train(7, run, resume=True) == (run, [5, 6, 7])


def train(model: nn.Module, server: Server, folder: Path, **options: Any) -> None:
    """Train three steps with a Trainer."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **options,
    )
    callback = TrainerCallback(url=server.url, every=1)
    Trainer(model=model, args=arguments, train_dataset=Points(), callbacks=[callback]).train()


@pytest.mark.filterwarnings("ignore")
def test_transformers_tries_again_after_a_failure(server: Server, tmp_path: Path) -> None:
    """As with ``auto_find_batch_size``: an attempt that ended in an exception has failed."""
    failing = [True, True]

    class Failing(Net):
        def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
            if failing:
                failing.pop()
                raise RuntimeError("CUDA out of memory.")
            return super().forward(x, labels)

    train(Failing(), server, tmp_path, per_device_train_batch_size=8, auto_find_batch_size=True)
    ends = [batch.end.status for batch in server.batches if batch.end is not None]
    assert ends == ["failed", "failed", "completed"]
    assert [sample.step for sample in server.samples] == [1, 2, 3]


@pytest.mark.filterwarnings("ignore")
def test_transformers_with_accumulation_and_clipping(server: Server, tmp_path: Path) -> None:
    train(Net(), server, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.25)
    assert [sample.step for sample in server.samples] == [1, 2, 3]
    assert server.names == ["inner.weight", "inner.bias"]
    assert server.scalar("clipped_global_grad_norm", 1) == pytest.approx(0.25, rel=1e-4)
    assert server.scalar("global_grad_norm", 1) == pytest.approx(server.trail("clip_norm")[1], rel=1e-5)
    assert server.batches[-1].end is not None


@pytest.mark.filterwarnings("ignore")
def test_accelerate(server: Server) -> None:
    from accelerate import Accelerator

    accelerator: Any = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer, loader = accelerator.prepare(
        *(lambda net: (net, torch.optim.SGD(net.parameters(), lr=1e-3)))(Net()), DataLoader(Points(), batch_size=3)
    )
    with watch(accelerator, model, optimizer, url=server.url, every=1):
        for batch in loader:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
    assert [sample.step for sample in server.samples] == [1, 2]
    assert server.scalar("clipped_global_grad_norm") == pytest.approx(0.5, rel=1e-4)
