"""The number of the last batch, in a file that the writer of a store and its followers have in memory.

A follower looks here before it catches up, which takes twenty times longer and holds the interpreter's lock. A number
that differs from its own says only that it has to: the store itself says how far it is.
"""

from __future__ import annotations

import mmap
from os import SEEK_END
from pathlib import Path

NAME = "ANNOUNCED"
BYTES = 8


class Announced:
    """The file in the folder of a store, to write in or to read; ``number`` is None where there is none to read."""

    def __init__(self, folder: Path, *, write: bool) -> None:
        self._page: mmap.mmap | None = None
        try:
            with (folder / NAME).open("a+b" if write else "rb") as file:
                if write and file.seek(0, SEEK_END) < BYTES:
                    file.write(bytes(BYTES))  # a place on the disk: on a full one, a write in memory would be fatal
                    file.flush()
                self._page = mmap.mmap(file.fileno(), BYTES, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # none, or an empty one: no writer has been here since it was copied
            if write:
                raise

    @property
    def number(self) -> int | None:
        return None if self._page is None else int.from_bytes(self._page[:], "big")

    @number.setter
    def number(self, number: int) -> None:
        assert self._page is not None
        self._page[:] = number.to_bytes(BYTES, "big")

    def close(self) -> None:
        """Let go of the file."""
        if self._page is not None:
            self._page.close()
            self._page = None
