"""Agents and servers of different versions, by what each version was recorded to say (tests/compatibility)."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest

from gradwatch import wire
from tests.agent.conftest import Server
from tests.compatibility.record import HERE, STEPS, train
from tests.processes import GradwatchServer

VERSIONS = sorted(HERE.glob("[0-9]*"))


@pytest.fixture(params=VERSIONS, ids=[folder.name for folder in VERSIONS])
def recorded(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.param
    return folder


@pytest.fixture(scope="module")
def listener() -> Iterator[Server]:
    """Receive what this version's agent sends of the training that is recorded."""
    listener = Server()
    train(listener.url)
    yield listener
    listener.close()


def _requests(recorded: Path) -> list[tuple[str, bytes]]:
    return msgspec.msgpack.decode((recorded / "requests.msgpack").read_bytes(), type=list[tuple[str, bytes]])


def _shape(value: Any) -> Any:
    """Return the names and types of a document."""
    return {name: _shape(item) for name, item in value.items()} if isinstance(value, dict) else type(value).__name__


def test_what_an_older_agent_sends_is_stored_and_answered_as_then(recorded: Path, server: GradwatchServer) -> None:
    answers = json.loads((recorded / "answers.json").read_text())
    for (path, body), answer in zip(_requests(recorded), answers, strict=True):
        response = server.http.post(path, content=body, headers={"Content-Type": wire.MESSAGEPACK_TYPE})
        assert response.is_success, response.text
        assert _shape(answer).items() <= _shape(response.json()).items()
    run = server.get(f"/api/v1/runs/{answers[0]['id']}")
    assert (run["project"], run["name"], run["state"], run["sample_count"]) == ("kept", "recorded", "finished", STEPS)


def test_what_this_agent_sends_was_valid_for_an_older_server(recorded: Path, listener: Server) -> None:
    schemas = json.loads((recorded / "schemas.json").read_text())
    documents: list[wire.Registration | wire.Batch] = [*listener.registrations, *listener.batches]
    assert {type(document) for document in documents} == {wire.Registration, wire.Batch}
    for document in documents:
        schema = {"$ref": f"#/components/schemas/{type(document).__name__}", "components": {"schemas": schemas}}
        jsonschema.validate(json.loads(wire.encode_json(document)), schema)


def test_a_statistic_that_an_older_server_does_not_know_is_found(recorded: Path) -> None:
    schemas = json.loads((recorded / "schemas.json").read_text())
    schema = {"$ref": "#/components/schemas/Sample", "components": {"schemas": schemas}}
    sample = {"step": 1, "at": 1.0, "statistics": {"of_tomorrow": [1.0]}}
    with pytest.raises(jsonschema.ValidationError, match="of_tomorrow"):
        jsonschema.validate(sample, schema)


def test_another_version_of_the_format_is_refused_in_words_that_say_what_to_upgrade(server: GradwatchServer) -> None:
    document = {"version": 2, "parameters": []}
    response = server.http.post("/api/v1/runs", json=document)
    assert response.status_code == 400
    assert "upgrade the older side" in response.text


def test_the_releases_are_there() -> None:
    assert "0.1.0" in {folder.name for folder in VERSIONS}
