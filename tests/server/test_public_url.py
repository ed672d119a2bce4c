"""Links lead to where people reach the server, which behind a proxy is not where it listens."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from gradwatch import wire
from gradwatch_server.errors import ConfigurationError
from gradwatch_server.settings import Configuration
from tests.processes import PATIENCE_SECONDS, GradwatchServer, WebhookReceiver, environment, sample
from tests.server.test_tokens import token

PUBLIC = "https://gradwatch.example.org"


def test_every_link_begins_with_the_public_address(tmp_path: Path) -> None:
    config = tmp_path / "gradwatch.toml"
    config.write_text(f'public_url = "{PUBLIC}/"\n')
    with (
        WebhookReceiver() as receiver,
        GradwatchServer(
            tmp_path / "gradwatch.db",
            "--config",
            str(config),
            "--webhook",
            receiver.url,
            "--webhook-secret",
            "whsec_" + "bmV3" * 8,
        ) as server,
    ):
        registration = wire.Registration(id="run1", parameters=[wire.Parameter("a.weight", [4, 4])])
        assert server.post("/api/v1/runs", registration).json()["url"] == f"{PUBLIC}/runs/run1"
        server.store("run1", wire.Batch(id="b", samples=[sample(1, float("nan"))]))
        told = json.loads(receiver.wait(1)[0][1])
        assert told["data"]["url"].startswith(f"{PUBLIC}/runs/run1?")
        metrics = server.http.get("/metrics").text
        assert f'gradwatch_run_info{{name="run1",project="default",run="run1",url="{PUBLIC}/runs/run1"}} 1.0' in metrics
        silence = {"author": "me", "ends_at": 4e9}
        from_there = server.http.post(
            "/api/v1/silences", json=silence, headers={"origin": "https://gradwatch.example.org"}
        )
        assert from_there.status_code == 201
        assert server.http.get("/api/v1/runs", headers={"host": "gradwatch.example.org"}).status_code == 200


def test_without_one_links_lead_to_where_the_server_listens(server: GradwatchServer) -> None:
    registration = wire.Registration(id="run1", parameters=[wire.Parameter("a", [4])])
    assert server.post("/api/v1/runs", registration).json()["url"] == f"{server.url}/runs/run1"


def test_links_of_a_server_on_all_addresses_lead_to_the_machines_name(tmp_path: Path) -> None:
    database = tmp_path / "gradwatch.db"
    secret = token(database, "create", "--scope", "ingest")
    with GradwatchServer(database, "--host", "0.0.0.0") as server:
        port = server.url.rpartition(":")[2]
        http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_SECONDS, trust_env=False)
        registration = wire.encode(wire.Registration(id="run1", parameters=[wire.Parameter("a", [4])]))
        headers = {"content-type": wire.MESSAGEPACK_TYPE, "authorization": f"Bearer {secret}"}
        answer = http.post("/api/v1/runs", content=registration, headers=headers)
        reachable = f"http://{socket.gethostname()}:{port}"
        assert answer.json()["url"] == f"{reachable}/runs/run1"
        http.close()
        assert server.process.stdout is not None
        assert server.process.stdout.readline().decode().startswith(f"links lead to {reachable};")


@pytest.mark.parametrize(
    "address", ["gradwatch.example.org", "ftp://a", "http://", "http://a:99999", "http://[::1", "http://a b"]
)
def test_an_address_that_is_none_is_refused_at_the_start(tmp_path: Path, address: str) -> None:
    config = tmp_path / "gradwatch.toml"
    for text, setting in (
        (f'public_url = "{address}"', "public_url"),
        (f'[remote_write]\nurl = "{address}"', "remote_write.url"),
    ):
        config.write_text(text)
        with pytest.raises(ConfigurationError, match=setting):
            Configuration.load(config)
    command = [
        sys.executable,
        "-m",
        "gradwatch",
        "serve",
        "--port",
        "0",
        "--database-url",
        f"sqlite:///{tmp_path}/a.db",
    ]
    done = subprocess.run(
        command, env=environment(GRADWATCH_PUBLIC_URL=address), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "GRADWATCH_PUBLIC_URL" in done.stderr
