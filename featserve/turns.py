"""How what takes long leaves the interpreter, and the core it runs on, to those who want a moment of them.

A write is a millisecond or more of Python in a process that answers reads meanwhile. Neither the interpreter nor the
scheduler of Linux would take its turn away in time: their slices are longer than that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SHORT_S, USUAL_S = 0.0001, sys.getswitchinterval()
"""How long a thread waits for Python code of another, which then lets it in: while something is written, and else."""


@contextmanager
def short_turns() -> Iterator[None]:
    """Let threads that wait for the interpreter in soon."""
    sys.setswitchinterval(SHORT_S)
    try:
        yield
    finally:
        sys.setswitchinterval(USUAL_S)


def give_way() -> None:
    """Between two steps: let who waits for the interpreter or for this core go first; a microsecond if nobody does."""
    os.sched_yield()
