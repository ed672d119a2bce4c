"""The bounds in the OpenAPI document are the ones that the server enforces."""

import gzip
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import jsonschema
import msgspec
import pytest

from gradwatch import wire
from gradwatch_server.errors import Refused
from gradwatch_server.ingest.validation import check_batch, check_registration
from gradwatch_server.settings import Limits
from tests.processes import GradwatchServer, sample
from tests.server.schema_edges import Edge, Edges

PACKED_JSON = {"content-type": wire.JSON_TYPE, "content-encoding": "gzip"}


@pytest.fixture(scope="module")
def described(shared_server: GradwatchServer) -> Any:
    return shared_server.get("/openapi.json")


def _edges(described: Any, name: str) -> list[Edge]:
    """Return the edges whose outer value breaks the schema: -1 is below a statistic's minimum, but stands for null."""
    reference = {"$ref": f"#/components/schemas/{name}"}
    validator = jsonschema.Draft202012Validator(reference | {"components": described["components"]})
    edges = Edges(described["components"]["schemas"]).of(reference)
    return [edge for edge in edges if edge.place.endswith("maxItems") or not validator.is_valid(edge.beyond)]


def _expected_status(edge: Edge) -> int:
    """Return 409 for a name that stands twice, 400 for a number that is no float32, else 422."""
    if edge.place.endswith("uniqueItems"):
        return 409
    return 400 if edge.place.endswith("statistics{}[] maximum") else 422


def _post(server: GradwatchServer, path: str, document: Any) -> httpx.Response:
    return server.http.post(path, content=gzip.compress(msgspec.json.encode(document), 1), headers=PACKED_JSON)


@pytest.mark.parametrize(("name", "bounds"), [("Registration", 30), ("Batch", 50)])
def test_what_is_beyond_a_bound_is_refused(
    shared_server: GradwatchServer, described: Any, name: str, bounds: int
) -> None:
    run = shared_server.register(["a"])
    path = "/api/v1/runs" if name == "Registration" else f"/api/v1/runs/{run}/samples"
    edges = _edges(described, name)
    assert len(edges) > bounds
    taken = {}
    for edge in edges:
        answer = _post(shared_server, path, edge.beyond)
        if answer.status_code != _expected_status(edge):
            taken[edge.place] = f"{answer.status_code} {answer.text:.300}"
    assert taken == {}


def test_bounds_of_what_the_agent_dropped_are_described_and_enforced(
    shared_server: GradwatchServer, described: Any
) -> None:
    run = shared_server.register(["a"])
    for name, schema in described["components"]["schemas"]["Dropped"]["properties"].items():
        assert (schema["minimum"], schema["maximum"]) == (0, 2**53), name
        refused = _post(shared_server, f"/api/v1/runs/{run}/samples", {"id": "b", "dropped": {name: -1}})
        assert (refused.status_code, refused.json()["title"]) == (422, "Invalid content")
        assert f"dropped.{name} -1" in refused.json()["detail"]


@pytest.mark.parametrize("name", ["Registration", "Batch"])
def test_what_is_at_a_bound_is_taken(shared_server: GradwatchServer, described: Any, name: str) -> None:
    for edge in _edges(described, name):
        if edge.within is None or ".unstepped[]" in edge.place:  # places in the sample, which has few
            continue
        path = "/api/v1/runs"
        document = edge.within
        if name == "Batch":
            path = f"/api/v1/runs/{shared_server.register(['a'])}/samples"
            for stored in document.get("samples", []):
                stored["unstepped"] = [0] * len(stored.get("unstepped", []))  # the run has one parameter
        elif edge.place != "id pattern":
            document = document | {"id": None}
        answer = _post(shared_server, path, document)
        assert answer.is_success, f"{edge.place} {answer.text}"


@pytest.mark.parametrize(
    ("limits", "registration", "reason"),
    [
        (Limits(name_characters=3), {"name": "four"}, "name 'four'... has 4 characters"),
        (Limits(name_characters=3), {"attributes": {"host": "a"}}, "limits.name_characters (3)"),
        (Limits(attribute_characters=2), {"attributes": {"os": "bsd"}}, "limits.attribute_characters (2)"),
        (Limits(scalar_names=1), {"attributes": {"a": "", "b": ""}}, "attributes has 2 entries"),
        (Limits(parameters=1), {"parameters": [wire.Parameter("a", []), wire.Parameter("b", [])]}, "limits.parameters"),
        (Limits(name_characters=6), {"parameters": [wire.Parameter("a", [])]}, "parameter 'float32'..."),
    ],
)
def test_settings_narrow_the_bounds_of_a_registration(limits: Limits, registration: Any, reason: str) -> None:
    document = wire.Registration(**{"parameters": [], "project": "p"} | registration)
    check_registration(document, Limits())
    with pytest.raises(Refused) as refusal:
        check_registration(document, limits)
    assert (refusal.value.status, reason in refusal.value.detail) == (422, True), refusal.value.detail


@pytest.mark.parametrize(
    ("limits", "batch", "reason"),
    [
        (
            Limits(name_characters=3),
            {"samples": [wire.Sample(step=0, at=0.0, scalars={"loss": 1.0})]},
            "scalars 'loss'",
        ),
        (Limits(name_characters=3), {"events": [wire.Event(step=0, at=0.0, kind="disarmed")]}, "event 'disarmed'"),
        (Limits(name_characters=8), {"end": wire.End(at=0.0)}, "end.status 'completed'"),
        (Limits(samples_per_batch=1), {"samples": [sample(1, 1.0), sample(2, 1.0)]}, "limits.samples_per_batch"),
        (Limits(events_per_batch=1), {"events": 2 * [wire.Event(step=0, at=0.0, kind="x")]}, "limits.events_per_batch"),
        (Limits(scalars_per_batch=1), {"trail": {"loss": wire.Trail(steps=[1, 2], values=[1.0, 1.0])}}, "scalars"),
    ],
)
def test_settings_narrow_the_bounds_of_a_batch(limits: Limits, batch: Any, reason: str) -> None:
    document = wire.Batch(id="b", **batch)
    check_batch(document, Limits())
    with pytest.raises(Refused) as refusal:
        check_batch(document, limits)
    assert (refusal.value.status, reason in refusal.value.detail) == (422, True), refusal.value.detail


def _requests(server: GradwatchServer, described: Any) -> Iterator[tuple[str, httpx.Request]]:
    """Yield what is bounded, and a request whose parameter or JSON document is just beyond that bound."""
    edges = Edges(described["components"]["schemas"])
    for template, operations in described["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", []):
                for edge in edges.of(parameter["schema"], f"{method} {template} {parameter['name']}"):
                    in_path = {parameter["name"]: edge.beyond} if parameter["in"] == "path" else {}
                    query = {} if in_path else {parameter["name"]: edge.beyond}
                    yield edge.place, server.http.build_request(method, _filled(template, in_path), params=query)
            body = operation.get("requestBody", {}).get("content", {})
            if body and wire.MESSAGEPACK_TYPE not in body:  # those are Registration and Batch
                for edge in edges.of(body[wire.JSON_TYPE]["schema"], f"{method} {template} "):
                    yield edge.place, server.http.build_request(method, _filled(template, {}), json=edge.beyond)


def _filled(template: str, names: dict[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda name: quote(names.get(name[1], "abc"), safe=""), template)


def test_a_request_beyond_a_bound_is_refused(shared_server: GradwatchServer, described: Any) -> None:
    taken, bounds = {}, 0
    for place, request in _requests(shared_server, described):
        answer = shared_server.http.send(request)
        bounds += 1
        if answer.status_code != 422:
            taken[place] = f"{answer.status_code} {answer.text:.300}"
    assert bounds > 50
    assert taken == {}


def test_every_kind_of_bound_has_an_edge() -> None:
    text = {"type": "string", "minLength": 1, "maxLength": 3, "pattern": "^[a-z]+$"}
    number = {"anyOf": [{"type": "number", "format": "float", "minimum": 0, "maximum": 5}, {"type": "null"}]}
    things = {"type": "array", "items": {"$ref": "#/Thing"}, "maxItems": 2, "uniqueItems": True}
    table = {"type": "object", "propertyNames": text, "additionalProperties": {"type": "integer", "minimum": 1}}
    schemas = {"Thing": {"type": "object", "properties": {"a": number}}}
    whole = {"type": "object", "properties": {"things": things, "table": table | {"maxProperties": 1}}}
    edges = list(Edges(schemas).of(whole))
    assert {edge.place.partition(",")[0] for edge in edges} == {
        "things[].a minimum",
        "things[].a maximum",
        "things maxItems",
        "things uniqueItems",
        "table{} minimum",
        "table name minLength",
        "table name maxLength",
        "table name pattern",
        "table maxProperties",
    }
    validator = jsonschema.Draft202012Validator(whole | schemas)
    for edge in edges:
        assert not validator.is_valid(edge.beyond), edge
        assert edge.within is None or validator.is_valid(edge.within), edge
