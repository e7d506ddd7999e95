"""How much memory an engine may take: sizes as they are written, and what this machine has."""

from __future__ import annotations

import os
import re
from pathlib import Path

from featserve.errors import DefinitionError

SIZE = re.compile(r"([1-9][0-9]{0,8})\s?([MG])B?", re.IGNORECASE)
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


def mebibytes(size: str) -> int:
    """Return a size such as "500M" or "4GB", which is 4 times 2**30 bytes, in MiB; raises DefinitionError."""
    match = SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    if match is None:
        raise DefinitionError(f"memory limit {size!r} is not a size as in 4G or 500M")
    return int(match[1]) * (1024 if match[2] in "Gg" else 1)


def machine_mebibytes() -> int:
    """Return the memory of this machine, or of the container that this is, in MiB."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    container = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return machine if container == "max" else min(machine, int(container) >> 20)
