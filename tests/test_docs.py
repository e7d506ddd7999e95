"""What the documents show is run: each Python block of a page, in order, in one project of its own."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    """Return the Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_the_examples_of_a_page_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block of a page runs as it stands, after those before it."""
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> int:
        words = [sys.executable, "-m", "featserve", *shlex.split(line)[1:]]
        return subprocess.run(words, check=False, capture_output=True, timeout=120).returncode

    names: dict[str, Any] = {"run": run, "__name__": "example"}
    for number, block in enumerate(blocks(page)):
        file = tmp_path / f"{page.stem}_{number}.py"  # a transform is captured from the file that it stands in
        file.write_text(block)
        exec(compile(block, str(file), "exec"), names)


def test_links_lead_somewhere() -> None:
    """A link from a page to a file of the repository names one that exists."""
    for page in [*PAGES, ROOT / "ARCHITECTURE.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
