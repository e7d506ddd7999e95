"""The rows that all are asked for: those of bench.project, as float32, in Redis as hashes and as blobs, and in Feast.

Redis gets them over a socket, as commands that NumPy lays out: all are of one length.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from bench.peers.environments import finish
from bench.project import FEATURES, KEY
from featserve.types import Array

AT_ONCE = 10_000
DIGITS = 7


def read(folder: Path) -> Array:
    """Return the values of a project's entities, (entities, features) float32."""
    table = pq.read_table(folder / "accounts.parquet")
    order = np.argsort(table.column(KEY).to_numpy())
    columns = [table.column(f"f{i}").to_numpy().astype("<f4") for i in range(FEATURES)]
    return np.stack(columns, axis=1)[order]


def fill_redis(port: int, values: Array, progress: Callable[[str], None]) -> None:
    """Write each row as blob:ENTITY and as hash:ENTITY."""
    length = values.shape[1] * 4
    blob = command([b"SET", b"blob:" + b"0" * DIGITS, b"\0" * length])
    names = [b"f%d" % i for i in range(values.shape[1])]
    hashed = command([b"HSET", b"hash:" + b"0" * DIGITS, *(part for name in names for part in (name, b"\0" * 4))])
    blob_at = np.arange(len(blob) - 2 - length, len(blob) - 2)
    hash_at = places(hashed, values.shape[1])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        answers = connection.makefile("rb")
        for first in range(0, len(values), AT_ONCE):
            progress(f"Redis: {first:,} of {len(values):,} rows")
            rows = values[first : first + AT_ONCE]
            for template, at in ((blob, blob_at), (hashed, hash_at)):
                connection.sendall(filled(template, at, rows, first))
                for _ in rows:
                    if answers.readline()[:1] not in (b"+", b":"):
                        raise RuntimeError("Redis refused a row")


def command(parts: list[bytes]) -> bytes:
    """Return a command as Redis reads it."""
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)


def places(command: bytes, features: int) -> Array:
    """Return where the bytes of the values are in an HSET of so many features of four bytes each."""
    found, at = [], len(command)
    for _ in range(features):
        at = command.rindex(b"$4\r\n", 0, at)
        found.append(np.arange(at + 4, at + 8))
    return np.concatenate(found[::-1])


def filled(template: bytes, at: Array, rows: Array, first: int) -> bytes:
    """Return a command for each row: the template with its entity and its values."""
    made = np.tile(np.frombuffer(template, np.uint8), (len(rows), 1))
    key_at = template.index(b":" + b"0" * DIGITS) + 1
    powers = 10 ** np.arange(DIGITS - 1, -1, -1)
    made[:, key_at : key_at + DIGITS] = np.arange(first, first + len(rows))[:, None] // powers % 10 + ord("0")
    made[:, at] = np.ascontiguousarray(rows).view(np.uint8)
    return made.tobytes()


def fill_feast(python: Path, folder: Path, values: Array, redis_port: int) -> None:
    """Make a repository in ``folder``, and write the rows to its online store, by Feast's own API."""
    folder.mkdir()
    np.save(folder / "values.npy", values)
    finish([str(python), "-m", "bench.peers.feast_repository", str(folder), str(redis_port)])
