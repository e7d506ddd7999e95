"""A disk that has little room and can be given more: what a store does when there is none."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

FREE_BYTES = 6 << 20
MEMORY_DISK = Path("/dev/shm")
MOST_BALLAST_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class SmallDisk:
    """A folder on a disk with 6 MiB free. ``enlarge`` frees at least 50 more."""

    folder: Path
    enlarge: Callable[[], object]


@contextmanager
def mounted(place: Path) -> Iterator[SmallDisk]:
    """Mount a file system in an empty folder; where none may be, as in most containers, fill the one in memory."""
    refused = as_root("mount", "-t", "tmpfs", "-o", f"size={FREE_BYTES},mode=1777", "tmpfs", str(place))
    if not refused:
        yield SmallDisk(place, lambda: as_root("mount", "-o", "remount,size=64m", str(place)))
        as_root("umount", "-l", str(place))
        return
    space = os.statvfs(MEMORY_DISK)
    ballast_bytes = space.f_bavail * space.f_frsize - FREE_BYTES
    if not 50 << 20 < ballast_bytes < MOST_BALLAST_BYTES:
        pytest.fail(f"no disk can be filled here: {refused}, and {MEMORY_DISK} is too large, or has no room")
    with filled(ballast_bytes) as disk:
        yield disk


def as_root(*command: str) -> str:
    """Run a command as root; return what it complains of."""
    words = command if os.geteuid() == 0 else ("sudo", "-n", *command)
    try:
        ended = subprocess.run(words, check=False, capture_output=True, text=True)
    except FileNotFoundError as error:
        return str(error)
    return "" if ended.returncode == 0 else ended.stderr.strip() or f"{words} failed"


@contextmanager
def filled(ballast_bytes: int) -> Iterator[SmallDisk]:
    """Fill the file system in memory up to what a small disk has, for as long as this is open."""
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as name, tempfile.TemporaryFile(dir=MEMORY_DISK) as ballast:
        os.posix_fallocate(ballast.fileno(), 0, ballast_bytes)
        yield SmallDisk(Path(name), lambda: ballast.truncate(0))
