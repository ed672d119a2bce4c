"""A network whose parameters are sharded over all ranks (FSDP2).

``torchrun --standalone --nproc-per-node=2 examples/fsdp2.py``, with ``gradwatch serve`` running.
Look at: one run, not one for each rank, with the norms of whole parameters, though no rank holds any of them whole.
"""

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import gradwatch


def main() -> None:
    """Train 60 steps on every rank's own batches."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)), nn.Linear(64, 1))
    for block in model:
        fully_shard(block, mesh=init_device_mesh("cpu", (distributed.get_world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    batches = torch.Generator().manual_seed(rank)
    with gradwatch.attach(model, optimizer, project="examples", run="fsdp2"):
        for _ in range(60):
            inputs = torch.randn(32, 64, generator=batches)
            loss = nn.functional.mse_loss(model(inputs), inputs.amax(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
