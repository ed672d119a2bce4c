"""Long lists come a page at a time, the newest first."""

from pathlib import Path

import pytest
import sqlalchemy as sa

from gradwatch_server.store import schema
from gradwatch_server.store.database import open_engine, writing
from tests.processes import GradwatchServer
from tests.server.hook import fill


@pytest.mark.parametrize(("path", "chosen"), [("alerts", "rule=dead"), ("deliveries", "receiver=nobody")])
def test_pages_follow_one_another_without_a_gap(tmp_path: Path, own_database_url: str, path: str, chosen: str) -> None:
    with GradwatchServer(tmp_path / "gradwatch.db", url=own_database_url) as server:
        run = server.register(["a"])
        fill(own_database_url, run, ["nobody"] * 1_050)
        _spread(own_database_url)
        everything = server.get(f"/api/v1/{path}", limit=10_000)
        made = "first_at" if path == "alerts" else "created_at"
        assert [entry[made] for entry in everything] == sorted((entry[made] for entry in everything), reverse=True)
        assert len(everything) == 1_050
        ids = [entry["id"] for entry in everything]
        assert [entry["id"] for entry in server.get(f"/api/v1/{path}")] == ids[:1_000]
        found, address = [], f"/api/v1/{path}?limit=400&{chosen}"
        while address:
            answer = server.http.get(address)
            found += [entry["id"] for entry in answer.json()]
            address = answer.links.get("next", {}).get("url", "")
        assert found == ids
        assert server.http.get(f"/api/v1/{path}", params={"limit": 0}).status_code == 422
        assert server.http.get(f"/api/v1/{path}", params={"limit": 10_001}).status_code == 422
        for nowhere in ("nothing", "nan,1", "inf,1", "1.0,\0", ""):
            assert server.http.get(f"/api/v1/{path}", params={"before": nowhere}).status_code == 422


def test_the_next_page_is_there_though_the_last_entry_of_this_one_is_gone(server: GradwatchServer) -> None:
    run = server.register(["a"])
    fill(f"sqlite:///{server.database}", run, ["nobody"] * 3)
    _spread(f"sqlite:///{server.database}")
    ids = [entry["id"] for entry in server.get("/api/v1/alerts")]
    first = server.http.get("/api/v1/alerts", params={"limit": 2})
    engine = open_engine(f"sqlite:///{server.database}")
    with writing(engine) as connection:  # as a pending alert is forgotten
        connection.execute(sa.delete(schema.alerts).where(schema.alerts.c.id == ids[1]))
    engine.dispose()
    following = server.http.get(first.links["next"]["url"])
    assert [entry["id"] for entry in following.json()] == ids[2:]


def _spread(url: str) -> None:
    """Let ten entries each begin at the same time."""
    engine = open_engine(url)
    with writing(engine) as connection:
        for table, column in ((schema.alerts, "first_at"), (schema.deliveries, "created_at")):
            ids = connection.execute(sa.select(table.c.id)).scalars().all()
            moved = sa.update(table).where(table.c.id == sa.bindparam("of")).values({column: sa.bindparam("at")})
            connection.execute(moved, [{"of": each, "at": number // 10} for number, each in enumerate(ids)])
    engine.dispose()
