"""``docker compose up``, checked by the real Compose; no engine runs here, so nothing is started."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from gradwatch_server.store.database import migrate, open_engine
from tests.postgres import binaries, postgres_database, postgres_server
from tests.processes import ROOT, GradwatchServer, environment
from tests.prometheus.programs import Prometheus, until

SECRETS = ("GRADWATCH_POSTGRES_PASSWORD", "GRADWATCH_READER_PASSWORD", "GRADWATCH_GRAFANA_PASSWORD")
KNOWN = dict.fromkeys(SECRETS, "secret")


def _compose(*arguments: str, **secrets: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GRADWATCH_")}
    program = Path(sys.executable).parent / "docker-compose"
    command = [str(program), "-f", str(ROOT / "docker-compose.yml"), *arguments]
    return subprocess.run(command, env=kept | secrets, capture_output=True, text=True, check=False)


def _services(*profile: str) -> dict[str, Any]:
    described = _compose(*profile, "config", "--format", "json", **KNOWN)
    assert described.returncode == 0, described.stderr
    services: dict[str, Any] = json.loads(described.stdout)["services"]
    return services


@pytest.mark.parametrize("profile", [(), ("--profile", "demo")], ids=["plain", "demo"])
def test_compose_finds_nothing(profile: tuple[str, ...]) -> None:
    checked = _compose(*profile, "config", "-q", **KNOWN)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.mark.parametrize("name", SECRETS)
def test_no_secret_has_a_default(name: str) -> None:
    checked = _compose("config", "-q", **{known: "x" for known in SECRETS if known != name})
    assert checked.returncode != 0
    assert name in checked.stderr


def test_the_demonstration_adds_a_training() -> None:
    plain = set(_services())
    assert plain == {"migrate", "server", "postgres", "prometheus", "alertmanager", "grafana"}
    assert set(_services("--profile", "demo")) - plain == {"training"}


def test_only_page_and_grafana_are_published_and_on_loopback() -> None:
    published = {
        name: [(port["host_ip"], port["target"]) for port in service["ports"]]
        for name, service in _services("--profile", "demo").items()
        if "ports" in service
    }
    assert published == {"server": [("127.0.0.1", 8321)], "grafana": [("127.0.0.1", 3000)]}


def test_every_image_is_pinned_and_every_server_checked() -> None:
    for name, service in _services().items():
        assert re.search(r":v?\d+\.\d+", service["image"]), f"{name}: {service['image']}"
        assert "healthcheck" in service or name == "migrate", name


def test_our_images_are_read_only_and_not_root() -> None:
    services = _services("--profile", "demo")
    for name in ("migrate", "server", "training"):
        assert services[name]["read_only"] is True
        assert services[name]["cap_drop"] == ["ALL"]
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    assert "USER 10001:10001" in next(stage for stage in stages if " AS base" in stage)
    last = stages[-1]
    assert last.startswith("base AS server")
    assert "build-training" not in last, "the server's image carries no torch"


def test_everything_that_is_mounted_exists() -> None:
    for service in _services().values():
        for volume in service.get("volumes", []):
            assert volume["type"] == "volume" or Path(volume["source"]).exists(), volume


def test_what_the_first_start_makes_lets_prometheus_and_a_training_in(postgres: str, tmp_path: Path) -> None:
    services = _services("--profile", "demo")
    assert all(
        {"/run/gradwatch"} <= {volume["target"] for volume in services[name]["volumes"]}
        for name in ("migrate", "prometheus", "training")
    )
    with postgres_database(postgres) as url:
        script = services["migrate"]["command"][-1].replace("$$", "$").replace("/run/gradwatch", str(tmp_path))
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        for _ in range(2):  # a second start makes no others
            subprocess.run(["sh", "-ec", script], env=environment(GRADWATCH_DATABASE_URL=url, PATH=path), check=True)
        listed = _tokens(url)
        assert sorted(line.split()[1] for line in listed.splitlines()) == ["ingest", "read"]
        with GradwatchServer(tmp_path / "server.db", "--host", "0.0.0.0", url=url) as server:
            sent = {"authorization": f"Bearer {(tmp_path / 'ingest').read_text().strip()}"}
            registered = server.http.post("/api/v1/runs", json={"parameters": []}, headers=sent)
            assert registered.status_code == 201, registered.text
            assert server.http.post("/api/v1/runs", json={"parameters": []}).status_code == 401
            ours = (ROOT / "dashboards" / "prometheus" / "prometheus.yml").read_text()
            configuration = ours.replace("/run/gradwatch", str(tmp_path)).replace("15s", "1s")
            configuration = configuration.replace("server:8321", server.url.removeprefix("http://"))
            with Prometheus(
                tmp_path / "prometheus", configuration.replace("rule_files:\n  - rules.yml\n", "")
            ) as prometheus:
                until(lambda: prometheus.query('up{job="gradwatch"} == 1'), "a scrape")


def _tokens(url: str) -> str:
    command = [sys.executable, "-m", "gradwatch", "token", "--database-url", url, "list"]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout


def test_grafanas_role_reads_and_changes_nothing() -> None:
    with postgres_server() as url:
        address = sa.make_url(url)
        environment = os.environ | {
            "PATH": f"{binaries()}{os.pathsep}{os.environ['PATH']}",
            "PGHOST": str(address.host),
            "PGPORT": str(address.port),
            "POSTGRES_USER": str(address.username),
            "POSTGRES_DB": str(address.database),
            "GRADWATCH_READER_PASSWORD": "it's secret",
        }
        subprocess.run([ROOT / "dashboards" / "postgres" / "reader.sh"], env=environment, check=True)
        owner = open_engine(url)
        migrate(owner)
        owner.dispose()
        reader = open_engine(address.set(username="gradwatch_reader").render_as_string(hide_password=False))
        with reader.connect() as connection:
            assert connection.execute(sa.text("SELECT count(*) FROM samples")).scalar_one() == 0
            settings = connection.execute(sa.text("SELECT rolconfig FROM pg_roles WHERE rolname = current_user"))
            assert "jit=off" in settings.scalar_one(), "each query of a board would be compiled"
            with pytest.raises(sa.exc.DBAPIError, match=r"read-only|permission denied"):
                connection.execute(sa.text("DELETE FROM runs"))
        reader.dispose()
