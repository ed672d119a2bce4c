"""The wheel alone: built, looked at as an index would, installed into an empty environment, used in another folder."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

import gradwatch
from tests.processes import ROOT

HEAVY = ("torch", "numpy", "scikit-learn")
"""Taken from the tests' own environment: a download of them would say nothing of this wheel."""


def _clean_environment() -> dict[str, str]:
    """Return this process's environment in which nothing leads to this tree."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("GRADWATCH_", "PYTHON"))}


def _run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, env=_clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _with_dependencies(names: tuple[str, ...]) -> Iterator[metadata.Distribution]:
    """Yield installed distributions and all that they need."""
    pending, seen = list(names), set[str]()
    while pending:
        name = pending.pop().lower().replace("_", "-")
        if name in seen:
            continue
        seen.add(name)
        distribution = metadata.distribution(name)
        yield distribution
        needed = [Requirement(text) for text in distribution.requires or ()]
        pending += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _link(folder: Path) -> None:
    """Fill a folder with links to the heavy distributions, and to nothing else of the tests' environment."""
    folder.mkdir()
    for distribution in _with_dependencies(HEAVY):
        for file in distribution.files or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    _run(*command, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of programs of an environment that holds the wheel and what it asks for."""
    folder = tmp_path_factory.mktemp("empty")
    _run(sys.executable, "-m", "venv", "environment", cwd=folder)
    programs = folder / "environment" / "bin"
    [packages] = (folder / "environment" / "lib").glob("python*/site-packages")
    _link(folder / "heavy")
    (packages / "heavy.pth").write_text(f"{folder / 'heavy'}\n")
    constraints = ("--constraint", ROOT / "constraints.txt")
    _run(programs / "python", "-m", "pip", "install", "--quiet", *constraints, f"{wheel}[demo]", cwd=folder)
    return programs


def test_a_package_index_would_take_it(wheel: Path) -> None:
    programs = Path(sys.executable).parent
    _run(programs / "twine", "check", "--strict", wheel, cwd=wheel.parent)
    _run(programs / "check-wheel-contents", "--config", ROOT / "pyproject.toml", wheel, cwd=wheel.parent)


def test_it_holds_what_is_needed_beside_the_code(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"gradwatch/py.typed", "gradwatch_server/alert.schema.json", "gradwatch_server/page/index.html"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_images_are_built_of_all_that_the_wheel_takes(wheel: Path, tmp_path: Path) -> None:
    allowed = [line.removeprefix("!") for line in (ROOT / ".dockerignore").read_text().split() if line.startswith("!")]
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    [last] = [number for number, stage in enumerate(stages) if stage.startswith("dependencies AS build\n")]
    for copied in re.findall(r"^COPY (?!--)(.+) \S+$", "\n".join(stages[: last + 1]), re.MULTILINE):
        for name in copied.split():
            assert name in allowed, f".dockerignore leaves out {name}"
            source, target = ROOT / name, tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, cwd=tmp_path / "source")
    [built] = tmp_path.glob("*.whl")
    assert zipfile.ZipFile(built).namelist() == zipfile.ZipFile(wheel).namelist()


def test_one_version(wheel: Path) -> None:
    version = gradwatch.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)
    assert wheel.name == f"gradwatch-{version}-py3-none-any.whl"
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    images = re.findall(r"image: gradwatch-\w+:(\S+)", (ROOT / "docker-compose.yml").read_text())
    assert set(images) == {version}
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_alone_shows_the_demonstration(installed: Path, tmp_path: Path) -> None:
    assert _run(installed / "gradwatch", "--version", cwd=tmp_path) == f"gradwatch {gradwatch.__version__}\n"
    output = _run(installed / "gradwatch", "demo", "--folder", tmp_path / "demo", cwd=tmp_path)
    for expected in ("critical vanishing  20-sigmoid-layers", "critical exploding", "critical nonfinite  nan-midway"):
        assert expected in output
    assert re.search(r"ok +healthy +no alert", output)
    assert "4 runs, 3 alerts, 6 signed webhooks delivered" in output
    assert str(ROOT) not in output


def test_the_wheel_alone_migrates_and_serves_its_page(installed: Path, tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path / 'gradwatch.db'}"
    _run(installed / "gradwatch", "migrate", "--database-url", database, cwd=tmp_path)
    command = (installed / "gradwatch", "serve", "--port", "0", "--database-url", database)
    with subprocess.Popen(
        command, cwd=tmp_path, env=_clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as server:
        assert server.stdout is not None
        url = server.stdout.readline().split()[3]
        with httpx.Client(base_url=url, trust_env=False) as http:
            assert http.get("/healthz").json()["version"] == gradwatch.__version__
            page = http.get("/", follow_redirects=True)
            assert "<title>" in page.text
            scripts = re.findall(r'(?:src|href)="(/[^"]+\.(?:js|css))"', page.text)
            assert scripts
            assert {http.get(path).status_code for path in scripts} == {200}
        server.terminate()
    assert server.returncode == 0


@pytest.mark.parametrize(
    ("schema", "pattern"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("vendor.citation-file-format", "CITATION.cff"),
    ],
)
def test_what_the_forge_reads_is_valid(schema: str, pattern: str) -> None:
    files = sorted(ROOT.glob(pattern))
    assert files
    _run(Path(sys.executable).parent / "check-jsonschema", "--builtin-schema", schema, *files, cwd=ROOT)


def test_the_workflow_runs_the_targets_that_a_person_runs() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    called = set(re.findall(r"run: make (\S+)", text))
    assert "test" in called
    assert called <= targets


def test_windows_is_told_the_way_out() -> None:
    program = "import sys; sys.platform = 'win32'; import gradwatch"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "WSL" in done.stderr.splitlines()[-1]
