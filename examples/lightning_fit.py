"""A Lightning fit with the callback.

``python examples/lightning_fit.py``, with ``gradwatch serve`` running.
Look at: the learning rate and the clipping norm beside the loss; the module has no line for them.
"""

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.integrations.lightning import GradwatchCallback


class Regression(lightning.LightningModule):
    """A small network that learns the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:  # noqa: ARG002  # Lightning's signature
        """Return the loss of a batch."""
        inputs, targets = batch
        return nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return the optimizer, and a rate that falls as a cosine."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]


def main() -> None:
    """Fit four epochs."""
    lightning.seed_everything(0)
    inputs = torch.randn(1024, 16)
    loader = DataLoader(TensorDataset(inputs, inputs.mean(1, keepdim=True)), batch_size=64, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[GradwatchCallback(project="examples", run="lightning")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), loader)


if __name__ == "__main__":
    main()
