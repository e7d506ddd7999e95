"""The environments of the peers: each its own, in .peers/, of the versions that bench/peers/requirements/ pins."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from bench.report import ROOT

FOLDER = ROOT / ".peers"
REQUIREMENTS = ROOT / "bench" / "peers" / "requirements"


class NotThere(Exception):
    """What is to be measured cannot be installed or started; the message says why."""


def python_of(name: str) -> Path:
    """Return the Python of an environment, which is made where it is missing or its requirements have changed."""
    wanted, folder = REQUIREMENTS / f"{name}.txt", FOLDER / name
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.is_file() or installed.read_bytes() != wanted.read_bytes():
        print(f"Installing {name} into {folder.relative_to(ROOT)} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        finish([sys.executable, "-m", "venv", str(folder)])
        finish([str(python), "-m", "pip", "-q", "--disable-pip-version-check", "install", "-r", str(wanted)])
        shutil.copyfile(wanted, installed)
    return python


def redis_server() -> str:
    """Return the path of redis-server."""
    found = shutil.which("redis-server")
    if found is None:
        raise NotThere("there is no redis-server on the path: apt-get install redis-server")
    return found


def redis_server_version() -> str | None:
    """Return the version of redis-server, None where there is none, or none that tells it."""
    found = shutil.which("redis-server")
    said = (
        ""
        if found is None
        else subprocess.run([found, "--version"], capture_output=True, text=True, check=False).stdout
    )
    told = re.search(r"\bv=(\S+)", said)
    return None if told is None else told[1]


def finish(command: list[str], cwd: Path = ROOT) -> None:
    """Run a command to its end; raise NotThere with what it said where it fails."""
    ran = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise NotThere(f"`{' '.join(command)}` failed:\n{ran.stdout}{ran.stderr}")
