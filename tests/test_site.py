"""The documentation's site: it builds without a warning, and a reader's browser asks nobody else for anything."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False
    )
    assert (built.returncode, built.stdout, built.stderr) == (0, "", "")
    return folder


def _outside(folder: Path) -> list[str]:
    """Return the addresses elsewhere that a browser would load from the pages and style sheets of a site."""
    pages = "".join(page.read_text() for page in folder.rglob("*.html"))
    styles = "".join(style.read_text() for style in folder.rglob("*.css"))
    found = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="?(https?:[^"> ]+)', pages)
    for link in re.findall(r"<link\b[^>]*>", pages):
        if 'rel="canonical"' not in link:
            found += re.findall(r'href="?(https?:[^"> ]+)', link)
    return found + re.findall(r"(?:url\(|@import )[\"']?(https?:[^\"') ]+)", styles)


def test_every_page_is_there(site: Path) -> None:
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages <= {page.parent.name for page in site.rglob("index.html")}
    navigation = (site / "index.html").read_text()
    assert [name for name in sorted(pages) if f'href="{name}/"' not in navigation] == []


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert _outside(site) == []


def test_an_address_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<script src="https://a.example/x.js"></script><link href="http://b.example/y">'
    )
    (tmp_path / "page.css").write_text("@import url(https://c.example/z.css)")
    assert len(_outside(tmp_path)) == 3
