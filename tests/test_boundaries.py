"""Who imports whom: agent and server in a fresh interpreter, the folders of the server by their import statements."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.layers import crowded, python_arrows, script_arrows, upward
from tests.processes import environment

SERVER_ONLY = (
    *("fastapi", "starlette", "pydantic", "uvicorn", "sqlalchemy", "alembic", "httpx", "prometheus_client"),
    "aiosmtplib",
)


AGENT = Path(__file__).parents[1] / "agent" / "gradwatch"
AGENT_LAYERS = (
    ("__main__",),
    ("cli", "demo"),
    ("launch", "integrations"),
    ("agent",),
    ("session",),
    ("lifecycle", "monitor"),
    ("samples",),
    ("delivery",),
    ("clipping",),
    ("recording",),
    ("ranks",),
    ("model",),
    ("norms",),
    ("steps", "hooks"),
    ("wire", "settings"),
    ("statistics",),
)
"""``__init__``, which loads the public names when they are used, is left out."""
SERVER = Path(__file__).parents[1] / "server" / "gradwatch_server"
SERVER_LAYERS = (
    ("cli", "serve"),
    ("app", "logs"),
    ("api",),
    ("services",),
    ("telemetry",),
    ("ingest",),
    ("alerting",),
    ("settings",),
    ("notify",),
    ("store",),
    ("diagnosis",),
    ("steady_clock", "errors", "plain_text"),
)
ONE_FILE_A_THING = ("rules", "receivers", "versions", "integrations", "cli")


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


def test_arrows_between_folders_point_one_way() -> None:
    arrows = python_arrows(SERVER)
    assert len(arrows) > 200
    assert upward(arrows, SERVER_LAYERS) == []


def test_arrows_between_folders_of_the_agent_point_one_way() -> None:
    public = Path("__init__.py")
    arrows = {arrow for arrow in python_arrows(AGENT) if public not in arrow}
    assert len(arrows) > 100
    assert upward(arrows, AGENT_LAYERS) == []


def test_the_step_core_needs_no_torch() -> None:
    assert not _loaded("import gradwatch.steps.core, gradwatch.steps.event_log") & {"torch", "numpy"}


def _write(root: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def test_an_arrow_that_points_upwards_is_found(tmp_path: Path) -> None:
    root = tmp_path / "gradwatch_server"
    texts = {
        "errors.py": "",
        "api/body.py": "from gradwatch_server.errors import Refused\nfrom gradwatch_server.store import schema",
        "store/schema.py": "import json\n\ndef late():\n    from gradwatch_server.api import body",
        "store/tokens.py": "import gradwatch_server.store.schema\nimport gradwatch_server.api.body",
    }
    _write(root, texts)
    arrows = python_arrows(root)
    assert len(arrows) == 5
    assert upward(arrows, SERVER_LAYERS) == ["store/schema.py -> api/body.py", "store/tokens.py -> api/body.py"]
    with pytest.raises(KeyError, match="store"):
        upward(arrows, (("api",), ("errors",)))


def test_an_upward_arrow_between_scripts_is_found(tmp_path: Path) -> None:
    texts = {
        "pages/run.js": 'import {\n  chart,\n} from "../charts/chart.js";\nimport "./runs.js";',
        "pages/runs.js": "",
        "charts/chart.js": 'const page = () => import("../pages/run.js");',
    }
    _write(tmp_path, texts)
    assert upward(script_arrows(tmp_path), (("pages",), ("charts",))) == ["charts/chart.js -> pages/run.js"]


def test_no_folder_is_crowded() -> None:
    for package in (AGENT, SERVER):
        assert crowded(package, ".py", most_in_root=9, most=12, exempt=ONE_FILE_A_THING) == {}


def test_a_crowded_folder_is_found(tmp_path: Path) -> None:
    _write(tmp_path, {f"m{number}.py": "" for number in range(10)})
    _write(tmp_path, {f"{folder}/m{number}.py": "" for folder in ("store", "rules") for number in range(13)})
    found = crowded(tmp_path, ".py", most_in_root=9, most=12, exempt=ONE_FILE_A_THING)
    assert found == {".": 10, "store": 13}


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
    assert str(torch.specifier) == ">=2.6"


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
