"""The ``OnlineStore`` on RocksDB, embedded through rocksdict: the default.

One process has it open for writing; any number may have it open for reading, each with the rows that were there when it
opened, or following what is written. Each keeps rows that it has read in a cache of its own. Writes go through the
write-ahead log. A bulk load is staged in SST files beside the store and ingested in one step. Notes are in a column
family that only the writer opens.

Following is RocksDB's secondary instance, which (10.4) has holes. Rows of a log that was merged into a file hide newer
ones of that file until a batch arrives by the next log (facebook/rocksdb#14444), and a log that vanishes between the
reading of the manifest and that of the logs is left out. So the writer puts something after each merge that it asks
for, each batch carries its number under ``SEQUENCE_KEY``, and a follower holds a batch once that key has said so and
another catch-up has followed.
"""

from __future__ import annotations

import operator
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import compress, islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import rocksdict

from featserve.codec import STAMP
from featserve.errors import StoreError
from featserve.store import Access, Change, Writes, newest
from featserve.store.ahead import AHEAD_KEY, Ahead
from featserve.store.announced import Announced
from featserve.store.cache import RowCache
from featserve.store.database import NOTES, WRITING, ingest, keys_of, open_database, options_of, translate, translated
from featserve.store.replaced import packed, place, replaced
from featserve.turns import give_way

FORMAT_KEY = b"\x00featserve"
FORMAT = b"rows 2"
SEQUENCE_KEY = b"\x00sequence"
"""How many batches and loads were written, as 8 bytes, big-endian: put with each, so that it is as old as they are."""
OPENINGS = 5
"""How often a follower tries to open a store whose writer merges files away meanwhile."""
FILE_BYTES = 1 << 30
"""A staged file that is this large is ended, even where the keys rise: a file is what RocksDB later merges whole."""


class RocksStore:
    """A RocksDB database in folder ``path``."""

    def __init__(
        self,
        path: Path,
        access: Access,
        *,
        fsync: bool,
        block_cache_mb: int,
        row_cache_mb: int,
        count_lookups: bool = False,
    ) -> None:
        self.path = path
        self._lock, self._updates = threading.Lock(), threading.RLock()
        self._loads: set[_Load] = set()
        self._ahead = Ahead(path)
        self._cache = RowCache(row_cache_mb << 20)
        blocks = rocksdict.Cache(block_cache_mb << 20)
        self._options, self._notes_options = options_of(blocks), options_of(blocks)
        if count_lookups:
            self._options.enable_statistics()
        self._fsync = fsync
        if access != "write" and not (path / "CURRENT").is_file():
            raise StoreError(f"there is no store at {path}; load one with `featserve materialize`")
        if access == "write":
            with translated(f"cannot make a store at {path}"):
                path.parent.mkdir(parents=True, exist_ok=True)
        self._access = access
        self._messages = tempfile.TemporaryDirectory(prefix="featserve-follow-") if access == "follow" else None
        self._db: rocksdict.Rdict | None = None
        self._notes: rocksdict.Rdict | None = None
        self._announced: Announced | None = None
        with translated(f"cannot open the store at {path}"):
            try:
                self._db = self._open_database()
                if access == "write":
                    WRITING.add(path.resolve())
                self._check_format()
                self._identity = (path / "IDENTITY").read_text(encoding="utf-8").partition("-")[0]
                self._sequence = self._written()
                if access != "read":
                    self._announced = Announced(path, write=access == "write")
                self._announce()
            except BaseException:
                self.close()
                raise
        if access == "write":
            for left in path.parent.glob(f".{path.name}.load-*"):  # of a process that died while loading
                shutil.rmtree(left)

    def _open_database(self) -> rocksdict.Rdict:
        if self._messages is None:
            notes = self._notes_options if self._access == "write" else None
            return open_database(self.path, self._options, self._access, notes=notes)
        # A follower keeps all files open, as the writer removes them when it has merged them. Each catch-up starts a
        # thread for each file that it may open at once: 1.2 ms with the default of 16, 0.05 ms with one.
        self._options.set_max_open_files(-1)
        self._options.set_max_file_opening_threads(1)
        for _ in range(OPENINGS - 1):
            with suppress(StoreError), translated("a file is gone"):
                return open_database(self.path, self._options, self._access, messages=self._messages.name)
        return open_database(self.path, self._options, self._access, messages=self._messages.name)

    def _check_format(self) -> None:
        db = self._opened()
        found = db.get(FORMAT_KEY)
        if found is None and self._access == "write" and db.latest_sequence_number() == 0:
            found = FORMAT
        if found == FORMAT and self._access == "write":
            if NOTES not in rocksdict.Rdict.list_cf(str(self.path), self._options):
                db.create_column_family(NOTES, self._notes_options)
            self._notes = db.get_column_family(NOTES)
            self._ahead.opened(db, self._notes)
            # Opening merged the logs. Followers let go of what they had of those when a merge is followed by a write.
            db.put(FORMAT_KEY, FORMAT)
            db.flush()
            db.put(FORMAT_KEY, FORMAT)
        elif found != FORMAT:
            kind = "is not a featserve store" if found is None else f"has format {found!r}, not {FORMAT!r}"
            remedy = "choose another [store] path, and load it with `featserve materialize`"
            raise StoreError(f"the database at {self.path} {kind}; {remedy}")

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        cache = self._cache
        state = cache.state
        rows = cache.get(keys)
        if None in rows:
            places = [i for i, row in enumerate(rows) if row is None]
            missed = list(dict.fromkeys(map(keys.__getitem__, places)))
            read = self._read(missed)
            cache.add(missed, read, state)
            found = dict(zip(missed, read, strict=True))
            for i in places:
                rows[i] = found[keys[i]]
        if (state & 1 or state != cache.state) and not cache.apart(keys, state):
            return self._read(keys)  # rows of before a write and of after it do not go together; all of one call do
        return rows

    def _read(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the row of each key, past the cache."""
        try:
            found: list[bytes | None] = self._db.get(keys)  # type: ignore[union-attr]
        except Exception as error:
            raise translate(error, f"cannot read the store at {self.path}") from error
        return found

    def _held(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the row of each key, under the lock: as nothing is being written, the cached ones are the store's."""
        rows = self._cache.peek(keys)
        missed = [key for key, row in zip(keys, rows, strict=True) if row is None]
        if missed:
            read = iter(self._read(missed))
            rows = [next(read) if row is None else row for row in rows]
        return rows

    def write_many(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> int:
        self._check_writable()
        best = newest(keys, rows)
        names = list(best)
        with self._lock:
            found = self._held(names)
            give_way()
            won = dict(zip(*_winners(names, list(best.values()), found), strict=True))
            if won:
                self._write(Writes(won), [key for key, row in zip(names, found, strict=True) if row is not None])
            for load in self._loads:
                load.touched.update(names)
        return len(won)

    def update(self, keys: Sequence[bytes], change: Change, *, own: tuple[bytes, ...] = ()) -> None:
        self._check_writable()
        with self._updates:
            rows = self.read_many(list(keys))
            writes = change(rows)
            if any(writes):
                new = {key for key, row in zip(keys, rows, strict=True) if row is None}
                with self._lock:
                    self._write(writes, [key for key in writes.rows if key not in new and not key.startswith(own)])

    def updating(self) -> AbstractContextManager[Any]:
        return self._updates

    def keys(self, first: bytes, end: bytes) -> Iterator[bytes]:
        with translated(f"cannot read the store at {self.path}"):
            yield from keys_of(self._opened(), first, lambda key: key < end)

    def noted(self, keys: list[bytes]) -> list[bool]:
        with translated(f"cannot read the store at {self.path}"):
            return [value is not None for value in self._opened_notes().get(keys)]

    def notes(self, first: bytes, end: bytes) -> Iterator[bytes]:
        with translated(f"cannot read the store at {self.path}"):
            yield from keys_of(self._opened_notes(), first, lambda key: key < end)

    def _write(self, writes: Writes, old: Sequence[bytes] | None) -> None:
        """Write as one batch with its number, under the lock.

        ``old``: the keys that had a row; None where rows of any keys were replaced just before.
        """
        note = self._ahead.begin(self._opened(), writes.note)
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key, row in writes.rows.items():
            if row is None:
                batch.delete(key)
            else:
                batch.put(key, row)
        notes = self._opened().get_column_family_handle(NOTES)  # one that is kept keeps the database open
        for key in writes.forget:
            batch.delete(key, notes)
        for key in note:
            batch.put(key, b"", notes)
        if self._ahead.keys:
            batch.delete(AHEAD_KEY, notes)
        number = self._sequence + 1
        batch.put(SEQUENCE_KEY, number.to_bytes(8, "big"))
        batch.put(place(number), packed(number, old))
        give_way()
        with translated(f"cannot write to the store at {self.path}"):
            with self._changing(writes.rows.keys()) as cached:
                self._opened().write(batch)
                self._ahead.keys = ()
                cached.append(writes.rows)
            self._sequence = number
            if self._fsync:  # not by the write, which keeps the interpreter's lock while the disk is waited for
                self._opened().flush_wal(True)
        self._announce()

    def _announce(self) -> None:
        """Let followers know that there is something new, once the writer has it."""
        if self._access == "write" and self._announced is not None:
            self._announced.number = self._sequence

    @contextmanager
    def _changing(self, keys: Set[bytes] | None = None) -> Iterator[list[Mapping[bytes, bytes | None]]]:
        """Let the cache follow what changes the store; the caller appends what that was, or nothing where unknown.

        ``keys``: of which rows it is, where that is known before.
        """
        changed: list[Mapping[bytes, bytes | None]] = []
        self._cache.begin(keys)
        try:
            yield changed
        finally:
            self._cache.end(changed[0] if changed else None)

    def identity(self) -> str:
        return self._identity

    def sequence(self) -> int:
        return self._sequence

    def catch_up(self) -> None:
        if self._access != "follow":
            return
        db = self._opened()
        assert self._announced is not None
        if self._announced.number == self._sequence:
            return
        with self._lock, self._changing() as cached, translated(f"cannot follow the store at {self.path}"):
            db.try_catch_up_with_primary()
            written = self._written()
            if written == self._sequence:
                cached.append({})
                return
            db.try_catch_up_with_primary()
            if (keys := replaced(self._read, self._sequence + 1, written)) is not None:
                cached.append(dict.fromkeys(keys))
            self._sequence = written

    def _written(self) -> int:
        """Return the number of the last batch that a read sees."""
        return int.from_bytes(self._opened().get(SEQUENCE_KEY) or b"", "big")

    @contextmanager
    def load(self) -> Iterator[_Load]:
        self._check_writable()
        load = _Load(self)
        with self._lock:
            self._loads.add(load)
        try:
            yield load
            with self._lock:
                load.commit()
                for other in self._loads - {load}:
                    other.overtaken = True
        finally:
            with self._lock:
                self._loads.discard(load)
            load.discard()

    def count(self, prefix: bytes) -> int:
        with translated(f"cannot read the store at {self.path}"):
            return sum(1 for _ in keys_of(self._opened(), prefix, lambda key: key.startswith(prefix)))

    def size_bytes(self) -> int:
        total = 0
        for file in self.path.iterdir():
            with suppress(FileNotFoundError):  # RocksDB removes files that it has merged into others
                total += file.stat().st_size
        return total

    def cache_lookups(self) -> dict[str, tuple[int, int]]:
        told = self._options.get_statistics() or ""
        found = re.findall(r"^rocksdb\.block\.cache\.(hit|miss) COUNT : (\d+)$", told, re.MULTILINE)
        counts = {result: int(count) for result, count in found}
        lookups = {"row": (self._cache.hits, self._cache.misses)}
        return lookups | ({"block": (counts["hit"], counts["miss"])} if counts else {})

    def close(self) -> None:
        db, self._db = self._db, None
        self._notes = None  # the database is open while there is a way to it
        with self._changing():
            pass  # nothing is read any more
        if self._messages is not None:
            self._messages.cleanup()
        if self._announced is not None:
            self._announced.close()
        if db is not None:
            try:
                db.close()
            except Exception as error:
                # After a write that failed RocksDB does not flush either. What was acknowledged is in its log.
                if "Writer has previous error" in str(error):
                    return
                raise translate(error, f"cannot close the store at {self.path}") from error
            finally:
                if self._access == "write":
                    WRITING.discard(self.path.resolve())

    def _opened(self) -> rocksdict.Rdict:
        if self._db is None:
            raise StoreError(f"the store at {self.path} is closed")
        return self._db

    def _opened_notes(self) -> rocksdict.Rdict:
        self._check_writable()
        assert self._notes is not None
        if self._ahead.keys:
            with self._lock:
                self._ahead.settle(self._opened())
        return self._notes

    def _check_writable(self) -> None:
        self._opened()
        if self._access != "write":
            raise StoreError(f"the store at {self.path} is open for reading; open it for writing")

    def _overlaps(self, first: bytes, last: bytes) -> bool:
        """Say whether any key lies between ``first`` and ``last``."""
        with translated(f"cannot read the store at {self.path}"):
            return any(True for _ in keys_of(self._opened(), first, lambda key: key <= last))

    def _ingest(self, files: list[Path]) -> None:
        """Make the rows of files visible, under the lock."""
        with translated(f"cannot load into the store at {self.path}"):
            # A follower leaves out what is still in the log and older than a file.
            self._opened().flush()
            with self._changing():
                ingest(self._opened(), files)
        self._write(Writes({}), None)


class _Load:
    """Rows staged in SST files, each of rising keys, and each holding only rows that win over those before it."""

    def __init__(self, store: RocksStore) -> None:
        self.touched: set[bytes] = set()
        self.overtaken = False
        self._store = store
        self._folder = store.path.parent / f".{store.path.name}.load-{uuid4().hex[:12]}"
        with translated(f"cannot stage a load in {self._folder}"):
            self._folder.mkdir()
        self._files: list[Path] = []
        self._open: rocksdict.SstFileWriter | None = None
        self._last = b""
        self._staging: rocksdict.Rdict | None = None
        self._staged = 0
        self.stored = 0

    def add(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        if not all(map(operator.lt, keys, islice(keys, 1, None))):
            best = newest(keys, rows)
            keys = sorted(best)
            rows = [best[key] for key in keys]
        if not keys:
            return
        if self._open is not None and (keys[0] <= self._last or self._open.file_size() >= FILE_BYTES):
            self._finish()
        if self._store._overlaps(keys[0], keys[-1]):
            keys, rows = _winners(keys, rows, self._store._read(list(keys)))
        new = len(keys)
        if self._files:  # the open file has smaller keys
            staged = self._staged_rows(list(keys))
            new = staged.count(None)
            keys, rows = _winners(keys, rows, staged)
        self.stored += new
        self._write(keys, rows)

    def _write(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """Append rows of rising keys to the open file, or begin one."""
        if not keys:
            return
        with translated(f"cannot stage a load in {self._folder}"):
            if self._open is None:
                self._open = rocksdict.SstFileWriter(options=self._store._options)
                self._open.open(str(self._path()))
            writer = self._open
            for key, row in zip(keys, rows, strict=True):
                writer[key] = row
        self._last = keys[-1]

    def _path(self) -> Path:
        return self._folder / f"{len(self._files):06d}.sst"

    def _finish(self) -> None:
        """End the open file, if there is one."""
        if self._open is not None:
            with translated(f"cannot stage a load in {self._folder}"):
                self._open.finish()
            self._open = None
            self._files.append(self._path())

    def _staged_rows(self, names: list[bytes]) -> list[bytes | None]:
        """Return the newest staged row of each key, from a database of the files that are finished."""
        with translated(f"cannot stage a load in {self._folder}"):
            if self._staging is None:
                self._staging = open_database(self._folder / "staging", self._store._options, "write")
            if links := [Path(f"{file}.link") for file in self._files[self._staged :]]:
                for link in links:
                    os.link(link.with_suffix(""), link)
                ingest(self._staging, links)
                self._staged = len(self._files)
            found: list[bytes | None] = self._staging.get(names)
        return found

    def _staged_names(self) -> list[bytes]:
        """Return every key that is staged."""
        self._staged_rows([])
        with translated(f"cannot stage a load in {self._folder}"):
            return list(keys_of(self._staging, b"", lambda key: True))

    def commit(self) -> None:
        """Ingest all in one step. Rows written meanwhile that are newer go on top, so no reader sees them vanish."""
        self._finish()
        if self._files and (self.touched or self.overtaken):
            names = self._staged_names() if self.overtaken else sorted(self.touched)
            live = self._store._read(names)
            staged = self._staged_rows(names)
            on_top = {
                name: row
                for name, row, old in zip(names, live, staged, strict=True)
                if old is not None and row is not None and row[STAMP] > old[STAMP]
            }
            self._write(list(on_top), list(on_top.values()))
            self._finish()
            self.stored -= len(on_top)
        if self._files:
            self._store._ingest(self._files)

    def discard(self) -> None:
        if self._staging is not None:
            self._staging.close()
        shutil.rmtree(self._folder)


def _winners(
    keys: Sequence[bytes], rows: Sequence[bytes], old: Sequence[bytes | None]
) -> tuple[list[bytes], list[bytes]]:
    """Return the keys and rows whose stamp is not less than that of the old row, where there is one."""
    wins = [before is None or before[STAMP] <= row[STAMP] for row, before in zip(rows, old, strict=True)]
    return list(compress(keys, wins)), list(compress(rows, wins))
