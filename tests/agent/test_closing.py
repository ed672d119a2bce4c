"""The end of a run is the last thing to give up, and what is left says where it is."""

import logging
import threading
import time
from pathlib import Path

import msgspec
import torch
from torch import nn

import gradwatch
from gradwatch import wire
from gradwatch.delivery.dropped import Dropped
from gradwatch.delivery.sender import Sender
from gradwatch.delivery.spool import Spool
from gradwatch.delivery.transport import DeliveryResult
from tests.processes import PATIENCE_SECONDS

from .conftest import Server

END = wire.End(at=1_790_000_000.0, status="failed", exit_code=3)


class Slow:
    """A transport whose first batch takes until closing's time is over."""

    def __init__(self) -> None:
        self.begun, self.over = threading.Event(), threading.Event()
        self.batches: list[wire.Batch] = []
        self.seconds: list[float] = []

    def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
        if path.endswith("/samples"):
            self.begun.set()
            assert self.over.wait(PATIENCE_SECONDS)
            self.batches.append(wire.read_back(body))
            self.seconds.append(timeout_seconds)
        return DeliveryResult("committed")


def test_the_end_goes_before_a_backlog_that_does_not_get_through(tmp_path: Path) -> None:
    spool = Spool(tmp_path, url="http://server", run="run", dropped=Dropped(), warn=print)
    spool.append("registration", wire.encode(wire.Registration(id="run", parameters=[])))
    for number in range(4):
        batch = wire.Batch(id=f"b{number}", attempt=7, end=END if number == 3 else None)
        spool.append("batch", wire.encode(batch))
    transport, texts = Slow(), list[str]()
    sender = Sender(spool, transport, Dropped(), texts.append, last=spool.last, place="a place")
    sender.start()
    assert transport.begun.wait(PATIENCE_SECONDS)
    sender.end(time.monotonic())
    transport.over.set()
    sender._thread.join(PATIENCE_SECONDS)
    assert [batch.id for batch in transport.batches] == ["b0", "b3-end"]
    assert msgspec.to_builtins(transport.batches[1].end) == msgspec.to_builtins(END)
    assert transport.batches[1].attempt == 7
    assert transport.seconds[1] >= 1.0
    assert spool.pending == 3  # the end among them: the server takes it twice
    sender.warn_of_what_waits(spool.pending)
    assert texts == ["not all was delivered in time, 3 documents wait in a place"]
    spool.close()


def test_a_server_that_was_never_reached_is_not_asked_for_longer(tmp_path: Path) -> None:
    spool = Spool(tmp_path, url="http://server", run="run", dropped=Dropped(), warn=print)
    spool.append("batch", wire.encode(wire.Batch(id="b", end=END)))
    posts: list[str] = []

    class Gone:
        def post(self, path: str, body: bytes, timeout_seconds: float) -> DeliveryResult:
            posts.append(path)
            return DeliveryResult("retry", "refused", refused=True)

    sender = Sender(spool, Gone(), Dropped(), lambda _text: None, last=spool.last)
    sender.end(time.monotonic())
    sender.start()
    sender._thread.join(PATIENCE_SECONDS)
    assert posts == []
    spool.close()


def test_what_is_left_says_where_it_is_and_how_it_gets_out(server: Server, tmp_path: Path) -> None:
    seen: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Keep()
    logging.getLogger("gradwatch").addHandler(handler)
    server.answer = lambda _server, _path: (503, {"Retry-After": "3600"}, b"{}")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    agent = gradwatch.attach(model, optimizer, url=server.url, every=1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    server.wait(lambda: bool(server.requests))
    agent.close()
    logging.getLogger("gradwatch").removeHandler(handler)
    (text,) = [text for text in seen if "wait in the spool" in text]
    assert str(tmp_path / "spool") in text
    assert "gradwatch flush" in text
