"""What the documentation says of alerts and settings is so, and nothing is left out."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import jsonschema
import msgspec
import pytest

from gradwatch import wire
from gradwatch_server.cli.receivers import _test_payload
from gradwatch_server.notify.outbox import DeliverySettings
from gradwatch_server.notify.receivers import AnyReceiver
from gradwatch_server.settings import Configuration, Connections, Limits, Metrics, RemoteWrite, Route
from gradwatch_server.store.rollups.retention import Retention
from tests.processes import ROOT, GradwatchServer, WebhookReceiver, sample

SCHEMA: dict[str, Any] = json.loads((ROOT / "docs" / "alert.schema.json").read_text())
PAGE = (ROOT / "docs" / "configuration.md").read_text()
EXAMPLE = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "alerts.md").read_text(), re.DOTALL)[0]


def fits(document: str | bytes) -> None:
    jsonschema.Draft202012Validator(SCHEMA).validate(json.loads(document))


def test_the_example_and_the_test_alert_fit_the_schema() -> None:
    fits(EXAMPLE)
    fits(_test_payload(1_790_000_000.0))


def test_delivered_payloads_fit_the_schema(tmp_path: Path) -> None:
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(tmp_path / "gradwatch.db", "--webhook", receiver.url) as server,
    ):
        run = server.register([f"layer{number}.weight" for number in range(30)])
        server.store(run, wire.Batch(id="b", samples=[sample(1, *[float("nan")] * 30)]))
        server.store(run, wire.Batch(id="end", end=wire.End(at=1_790_000_100.0)))
        bodies = [body for _, body in receiver.wait(2)]
        for body in bodies:
            fits(body)
        for body in bodies:
            data = json.loads(body)["data"]
            assert (len(data["parameters"]), data["parameters_left_out"]) == (20, 10)


def test_the_schema_can_refuse() -> None:
    wrong = json.loads(EXAMPLE)
    del wrong["data"]["remedy"]
    with pytest.raises(jsonschema.ValidationError, match="remedy"):
        fits(json.dumps(wrong))


def _sections() -> dict[str, set[str]]:
    """Return the settings that each section of the page documents."""
    parts = re.split(r"^## (.*)$", PAGE, flags=re.MULTILINE)[1:]
    return {
        title: set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))
        for title, text in zip(parts[::2], parts[1::2], strict=True)
    }


def test_every_setting_is_documented_and_nothing_else() -> None:
    structs: dict[str, Any] = {
        "`[limits]`": Limits,
        "`[connections]`": Connections,
        "`[metrics]`": Metrics,
        "`[remote_write]`": RemoteWrite,
        "`[retention]`": Retention,
        "`[delivery]`": DeliverySettings,
        "`[[routes]]`": Route,
    }
    for receiver in get_args(AnyReceiver):
        structs[f"`[[receivers]]` of type `{receiver.__struct_config__.tag}`"] = receiver
    sections = _sections()
    for title, struct in structs.items():
        assert sections.pop(title) == {field.name for field in msgspec.structs.fields(struct)}, title
    assert sections == {"`[rules]`": set(), "`[projects]`": set(), "Top level": {"public_url"}}
    assert {field.name for field in msgspec.structs.fields(Configuration)} == {
        *("public_url", "limits", "metrics", "remote_write", "retention", "delivery", "receivers", "routes", "rules"),
        "projects",
        "connections",
    }


def test_the_example_configuration_is_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text(re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)[0])
    monkeypatch.setenv("SLACK_WEBHOOK", "https://hooks.slack.com/services/a")
    monkeypatch.setenv("PAGER_SECRET", "whsec_" + "bmV3" * 11 + "=")
    configuration = Configuration.load(config)
    assert [receiver.name for receiver in configuration.receivers] == ["team", "pager"]
