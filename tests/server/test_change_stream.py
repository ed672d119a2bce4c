"""What the stream tells a listener that does not read for a while."""

from pathlib import Path

import sqlalchemy as sa

from gradwatch import wire
from gradwatch_server.ingest.transaction import Ingest
from gradwatch_server.settings import Configuration
from gradwatch_server.store.change_stream import ChangeStream
from gradwatch_server.store.database import migrate, open_engine, writing
from tests.processes import run_apart, sample


def _store(engine: sa.Engine, run: str, step: int) -> None:
    with writing(engine) as connection:
        batch = wire.Batch(id=str(step), samples=[sample(step, 1.0)])
        Ingest(Configuration(), "http://localhost").store(connection, run, batch)


def test_a_listener_that_does_not_read_is_told_the_newest_of_each_run_and_no_more(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path / 'gradwatch.db'}")
    migrate(engine)
    with writing(engine) as connection:
        for run in ("one", "two"):
            registration = wire.Registration(parameters=[wire.Parameter("a", [4, 4], units=4)])
            Ingest(Configuration(), "http://localhost").register(connection, run, registration)

    async def told() -> list[list[tuple[str, int | None]]]:
        feed, seen = ChangeStream(engine), []
        stream, reader = feed.listen(15.0), feed.listen(15.0)
        assert [await anext(stream), await anext(reader)] == [[], []], "they listen"
        seen.append(await anext(stream))
        for step in range(1, 4):
            for run in ("one", "two"):
                _store(engine, run, step)
            heard: dict[str, int | None] = {}
            while heard != {"one": step, "two": step}:
                heard |= {change["id"]: change["last_step"] for change in await anext(reader)}
        seen.append(await anext(stream))
        feed.close()
        assert [changes for listener in (stream, reader) async for changes in listener] == []
        return [sorted((change["id"], change["last_step"]) for change in changes) for changes in seen]

    assert run_apart(told()) == [[("one", None), ("two", None)], [("one", 3), ("two", 3)]]
    engine.dispose()
