"""``python -m tests.compatibility.record``: record what this version's agent and server say to each other.

It runs once for each release, and its folder is never written again: the bytes are what people's agents send.
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import httpx
import msgspec
import torch
from torch import nn

import gradwatch
from gradwatch import wire
from tests.agent.conftest import Server
from tests.processes import GradwatchServer

HERE = Path(__file__).parent
DOCUMENTS = ("Registration", "Batch")
STEPS = 4


def train(url: str) -> None:
    """Train a network of 7 parameters, one of them without a gradient, with all that an agent can tell."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.LayerNorm(4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].bias.requires_grad = False
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    with gradwatch.attach(model, optimizer, url=url, project="kept", run="recorded", every=1, clip=0.02) as agent:
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = model(torch.arange(9)).square().mean()
            (loss * (float("nan") if step == STEPS - 1 else 1)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            agent.log(accuracy=step / STEPS)


def main() -> None:
    """Record into the folder of this version."""
    folder = HERE / gradwatch.__version__
    requests: list[tuple[str, bytes]] = []
    listener = Server()
    keep = listener._keep

    def kept(path: str, body: bytes) -> bytes:
        requests.append((path, body))
        return keep(path, body)

    listener._keep = kept  # type: ignore[method-assign]
    train(listener.url)
    listener.close()
    folder.mkdir()
    (folder / "requests.msgpack").write_bytes(msgspec.msgpack.encode(requests))
    with tempfile.TemporaryDirectory() as data, GradwatchServer(Path(data) / "gradwatch.db") as server:
        answers = [_post(server.http, path, body).json() for path, body in requests]
        schemas = server.get("/openapi.json")["components"]["schemas"]
    (folder / "answers.json").write_text(json.dumps(answers, indent=1) + "\n")
    (folder / "schemas.json").write_text(json.dumps(_needed(schemas), indent=1) + "\n")


def _post(http: httpx.Client, path: str, body: bytes) -> httpx.Response:
    return http.post(path, content=body, headers={"Content-Type": wire.MESSAGEPACK_TYPE}).raise_for_status()


def _needed(schemas: dict[str, Any]) -> dict[str, Any]:
    """Return the schemas of what an agent sends, and those that they refer to."""
    needed: dict[str, Any] = {}
    pending = list(DOCUMENTS)
    while pending:
        name = pending.pop()
        if name not in needed:
            needed[name] = schemas[name]
            pending += [other for other in schemas if f'/schemas/{other}"' in json.dumps(schemas[name])]
    return needed


if __name__ == "__main__":
    main()
