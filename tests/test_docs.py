"""What the documents show is run, in order, in a folder of its own: each Python block, and each command of featserve.

A block of ``text`` after a block of Python is what that prints, to the letter; without one it prints nothing. After
commands it is what the last one ends with, but for the day and the widths of columns. ``featserve serve`` starts a real
server, whose port takes the place of the documents' 7070.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import serving
from tests.serving import PATIENCE_S, ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
DOCUMENTED = "127.0.0.1:7070"


def words(table: str) -> str:
    """Return what a table says, without its rules and spaces, and without instants and the ages that end a line."""
    return " ".join(re.sub(r"\d{4}-\d\d-\d\d \d\d:.*|─", "", table).split())


class Reader:
    """Somebody who does what a page says."""

    def __init__(self, page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
        self.page, self.folder, self.stack = page, folder, stack
        self.address = DOCUMENTED
        self.names: dict[str, Any] = {"__name__": "example"}
        self.goes_to = monkeypatch.chdir
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")

    def python(self, number: int, block: str) -> None:
        file = self.folder / f"{self.page.stem}_{number}.py"  # a transform is captured from the file that it stands in
        file.write_text(block.replace(DOCUMENTED, self.address))
        exec(compile(file.read_text(), str(file), "exec"), self.names)

    def console(self, block: str) -> str:
        """Run the commands of featserve; return what the last one printed."""
        printed = ""
        for line in re.findall(r"^\$ (.*)$", block, re.MULTILINE):
            for command in line.partition("#")[0].strip().replace(DOCUMENTED, self.address).split(" && "):
                if command.startswith("cd "):
                    self.goes_to(command.removeprefix("cd "))
                elif command == "featserve serve":
                    self.address, _ = self.stack.enter_context(serving(Path.cwd()))
                elif command.startswith("featserve "):
                    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=PATIENCE_S)
                    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
                    printed = done.stdout
        return printed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_shows_works(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every Python block and every command of featserve runs, after those before it, and prints what it shows."""
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall(page.read_text())
    with ExitStack() as stack:
        reader = Reader(page, tmp_path, monkeypatch, stack)
        for number, (kind, block) in enumerate(blocks):
            shown = "".join(text for after, text in blocks[number + 1 : number + 2] if after == "text")
            if kind == "python":
                capsys.readouterr()
                reader.python(number, block)
                printed = capsys.readouterr().out
                assert printed == shown, f"{page.name}: block {number} prints\n{printed}"
            elif kind == "console":
                printed = reader.console(block)
                assert words(printed).endswith(words(shown)), f"{page.name}: block {number} prints\n{printed}"


def test_links_lead_somewhere() -> None:
    """A link from a page to a file of the repository names one that exists."""
    for page in [*PAGES, ROOT / "ARCHITECTURE.md", *ROOT.glob("examples/*/README.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
