"""Names of runs, projects and parameters are text, whatever they hold: a receiver shows them and follows none."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from gradwatch import wire
from tests.processes import GradwatchServer, WebhookReceiver, sample

LINK = "[Reset password](https://evil.example)"
BOLD = "**[weight](https://evil.example)**"
CHANNEL = "<!channel> <https://evil.example|x>"


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What each kind of chat got of an alert whose run, project and parameter have hostile names."""
    folder = tmp_path_factory.mktemp("names")
    with WebhookReceiver() as slack, WebhookReceiver() as teams:
        receivers = {"slack": slack, "teams": teams}
        config = folder / "gradwatch.toml"
        config.write_text(
            "".join(
                f'[[receivers]]\nname = "{kind}"\ntype = "{kind}"\nurl = "{receiver.url}"\n'
                'allow_networks = ["127.0.0.0/8"]\n'
                for kind, receiver in receivers.items()
            )
        )
        with GradwatchServer(folder / "gradwatch.db", "--config", str(config)) as server:
            run = server.register([BOLD], project=CHANNEL, name=LINK)
            server.store(run, wire.Batch(id="1", samples=[sample(1, 1.0), sample(2, float("nan"))]))
            yield {kind: json.loads(receiver.wait(1)[0][1]) for kind, receiver in receivers.items()}


def shown(document: Any) -> Iterator[str]:
    """Yield the texts of an adaptive card that Teams renders as Markdown."""
    if isinstance(document, list):
        for entry in document:
            yield from shown(entry)
    elif isinstance(document, dict):
        for key, entry in document.items():
            if key in ("text", "title", "value") and isinstance(entry, str):
                yield entry
            else:
                yield from shown(entry)


@pytest.mark.xfail(
    strict=True,
    raises=AssertionError,
    reason="Markdown in the names of runs and parameters is not escaped in the cards of Microsoft Teams",
)
def test_teams_shows_no_link_that_a_name_holds(told: dict[str, Any]) -> None:
    texts = list(shown(told["teams"]["attachments"][0]["content"]["body"]))
    assert any("Reset password" in text for text in texts)
    assert any("weight" in text for text in texts)
    for text in texts:
        assert not re.search(r"(?<!\\)\[[^\[\]]*(?<!\\)\]\(", text), f"a link: {text}"
        assert not re.search(r"(?<!\\)\*\*", text), f"bold: {text}"


def test_slack_calls_nobody_and_shows_no_link_that_a_name_holds(told: dict[str, Any]) -> None:
    texts = [told["slack"]["text"], told["slack"]["blocks"][0]["text"]["text"]]
    for text in texts:
        assert "<!channel>" not in text
        assert "<https://evil.example" not in text
        assert "&lt;!channel&gt;" in text
