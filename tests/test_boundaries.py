"""The agent imports nothing of the server's, the server no torch: proven in a fresh interpreter."""

import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from tests.processes import environment

SERVER_ONLY = ("fastapi", "starlette", "pydantic", "uvicorn", "sqlalchemy", "alembic", "httpx", "prometheus_client")


def _loaded(statement: str) -> set[str]:
    """Return the top-level modules that a statement loads in a fresh interpreter."""
    program = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    output = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True, check=True
    )
    return set(output.stdout.split())


def test_the_server_loads_no_torch() -> None:
    assert "torch" not in _loaded("import gradwatch_server.serve, gradwatch_server.app")


def test_the_agent_loads_nothing_of_the_server() -> None:
    loaded = _loaded("import gradwatch; gradwatch.attach; import gradwatch.launch.command, gradwatch.delivery.flush")
    assert "torch" in loaded
    assert not loaded & {*SERVER_ONLY, "gradwatch_server"}


def test_the_wire_format_and_the_command_need_neither() -> None:
    assert not _loaded("import gradwatch.wire, gradwatch.cli") & {*SERVER_ONLY, "torch", "gradwatch_server"}


def test_the_launcher_and_flush_load_no_torch() -> None:
    assert not _loaded("import gradwatch.launch.command, gradwatch.delivery.flush") & {*SERVER_ONLY, "torch"}


def test_these_tests_can_fail() -> None:
    assert "torch" in _loaded("import gradwatch.launch.command, gradwatch.agent")
    assert "torch" in _loaded("import gradwatch_server.app, torch")
    assert "fastapi" in _loaded("import gradwatch, gradwatch_server.app")


def _extra(name: str) -> set[str]:
    found = (Requirement(line) for line in metadata.requires("gradwatch") or [])
    return {entry.name for entry in found if entry.marker is None or entry.marker.evaluate({"extra": name})}


def test_each_extra_brings_only_its_own() -> None:
    assert _extra("agent") == {"msgspec", "numpy", "torch", "urllib3"}
    assert "torch" not in _extra("server")
    assert {"fastapi", "uvicorn", "sqlalchemy", "alembic"} <= _extra("server")


def test_torch_is_not_capped_for_users() -> None:
    found = [Requirement(line) for line in metadata.requires("gradwatch") or []]
    (torch,) = {entry for entry in found if entry.name == "torch" and "agent" in str(entry.marker)}
    assert str(torch.specifier) == ">=2.4"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["serve", "--help"],
        ["run", "--help"],
        ["flush", "--help"],
        ["alerts", "--help"],
        ["silence", "--help"],
        ["receivers", "--help"],
    ],
)
def test_every_command_explains_itself(arguments: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "gradwatch", *arguments], env=environment(), capture_output=True, text=True, check=True
    )
    assert "gradwatch" in shown.stdout


def test_an_unknown_command_is_named() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "gradwatch", "sevre"], env=environment(), capture_output=True, text=True
    )
    assert shown.returncode == 2
    assert "unknown command 'sevre'" in shown.stderr
