"""The embedded store on disk: what survives, who may open it, and what it says of files that are damaged or foreign."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
import rocksdict

from featserve.errors import StoreError, StoreFull, StoreLocked
from featserve.store import Writes, open_store
from featserve.store.database import is_locked
from featserve.store.rocksdb import RocksStore
from tests.disk import SmallDisk

KEYS = [b"key %06d" % i for i in range(5_000)]


def row(n: int, payload: bytes = b"") -> bytes:
    return b"\xf5\x01\0\0view" + n.to_bytes(8, "big") * 3 + payload


def opened(path: Path, access: str = "write", **options: object) -> RocksStore:
    store = open_store(path, access, **{"block_cache_mb": 8, "row_cache_mb": 1} | options)  # type: ignore[arg-type]
    assert isinstance(store, RocksStore)
    return store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The folder of a store with loaded rows in its files and written ones in its log."""
    path = tmp_path / "store"
    generator = np.random.default_rng(7)
    store = opened(path)
    with store.load() as load:
        load.add(KEYS, [row(5, generator.bytes(100)) for _ in KEYS])
    store.write_many(KEYS[::10], [row(6) for _ in KEYS[::10]])
    store.close()
    return path


def test_reopening_keeps_every_row(path: Path) -> None:
    """What was written and loaded is there for the next process, to read or to write, and the order of stamps holds."""
    with_written = [row(6) if i % 10 == 0 else None for i in range(len(KEYS))]
    for access in ("read", "write"):
        store = opened(path, access)
        found = store.read_many(KEYS)
        assert all(a == b if b else a is not None and len(a) == 132 for a, b in zip(found, with_written, strict=True))
        assert store.count(b"key") == len(KEYS)
        store.close()
    store = opened(path)
    assert store.write_many(KEYS[:2], [row(5), row(7)]) == 1
    store.close()


def test_rows_survive_the_death_of_the_process(tmp_path: Path) -> None:
    """A process that is killed after a write was acknowledged, in the middle of a load, loses the load alone."""
    script = f"""
        import os, signal
        from pathlib import Path
        from featserve.store import open_store
        store = open_store(Path({str(tmp_path / "store")!r}), "write", block_cache_mb=8)
        row = b"\\xf5\\x01\\0\\0view" + bytes(24)
        store.write_many([b"written"], [row])
        with store.load() as load:
            for i in range(3):
                load.add([b"loaded", b"%d" % i], [row, row])
            os.kill(os.getpid(), signal.SIGKILL)
    """
    killed = subprocess.run([sys.executable, "-c", dedent(script)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".store.load-*"))) == 1
    store = opened(tmp_path / "store")
    assert store.read_many([b"written", b"loaded", b"0"]) == [b"\xf5\x01\0\0view" + bytes(24), None, None]
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]
    store.close()


WRITER = """
import sys
from pathlib import Path
from featserve.store import open_store
store = open_store(Path(sys.argv[1]), "write", block_cache_mb=8)
number = int(sys.argv[2])
def row(): return b"\\xf5\\x01\\0\\0view" + number.to_bytes(8, "big") * 3 + b"x" * (number % 3000)
while True:
    number += 1
    if number % 4:
        store.write_many([b"written %d" % i for i in range(10)], [row()] * 10)
    else:
        with store.load() as load:
            for part in range(3):
                load.add([b"loaded %03d" % i for i in range(part * 40, part * 40 + 60)], [row()] * 60)
    print(number, flush=True)
"""


@pytest.mark.slow
class Recorded:
    """A database whose log is noted each time that it is sent to the disk, and cannot be where it is ``broken``."""

    def __init__(self, database: rocksdict.Rdict) -> None:
        self.synced: list[bool] = []
        self.broken = False
        self._database = database

    def __getattr__(self, name: str) -> object:
        return getattr(self._database, name)

    def flush_wal(self, sync: bool) -> None:
        self.synced.append(sync)
        if self.broken:
            raise OSError("IO error: While fdatasync")
        self._database.flush_wal(sync)


@pytest.mark.parametrize("durability", ["process", "fsync"])
def test_a_write_waits_for_the_disk_where_that_is_asked_for(
    path: Path, durability: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the durability "fsync" the log is on the disk when a write returns, and where it is not the write fails."""
    store = opened(path, durability=durability)
    recorded = Recorded(store._db)
    monkeypatch.setattr(store, "_db", recorded)
    store.write_many(KEYS[:2], [row(7), row(7)])
    store.update([b"a"], lambda rows: Writes({b"a": row(1)}))
    assert recorded.synced == ([True, True] if durability == "fsync" else [])
    recorded.broken = True
    if durability == "fsync":
        with pytest.raises(StoreError, match="fdatasync"):
            store.write_many(KEYS[:1], [row(8)])
    store.close()


def test_fifty_kills_lose_nothing(tmp_path: Path, rng: np.random.Generator) -> None:
    """However often the writer is killed, all that it acknowledged is there, and no write or load is there in part."""
    path, acknowledged = tmp_path / "store", 0
    for _ in range(50):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(acknowledged)], stdout=subprocess.PIPE, text=True
        ) as writer:
            assert writer.stdout is not None
            for _ in range(int(rng.integers(1, 40))):
                acknowledged = int(writer.stdout.readline())
            writer.kill()
            acknowledged = int(([str(acknowledged), *writer.stdout.read().split("\n")[:-1]])[-1])
        store = opened(path)
        numbers = []
        for keys in ([b"written %d" % i for i in range(10)], [b"loaded %03d" % i for i in range(140)]):
            found = {row and (int.from_bytes(row[8:16], "big"), len(row)) for row in store.read_many(keys)}
            (only,) = found
            numbers.append(only[0] if only else 0)
        assert max(numbers) >= acknowledged
        assert min(numbers) >= acknowledged - 4
        acknowledged = max(numbers)
        assert list(tmp_path.iterdir()) == [path]
        store.close()


def test_the_caches_are_as_configured(path: Path) -> None:
    """An existing store gets the block cache that is configured, not RocksDB's default of 8 MiB."""
    for access in ("write", "read"):
        store = opened(path, access, block_cache_mb=33)
        assert store._opened().property_int_value("rocksdb.block-cache-capacity") == 33 << 20
        store.close()


def test_one_writer(path: Path) -> None:
    """A second opening for writing is refused, in this process and from another, with what to do about it."""
    store = opened(path)
    with pytest.raises(StoreLocked, match=r"another process has it open for writing.*materialize --to"):
        opened(path)
    script = f"""
        from pathlib import Path
        from featserve.errors import StoreLocked
        from featserve.store import open_store
        from featserve.store.database import is_locked
        path = Path({str(path)!r})
        assert is_locked(path)
        try:
            open_store(path, "write")
        except StoreLocked as error:
            print(error)
        reader = open_store(path, "read")
        print(reader.read_many([b"key 000000"]))
    """
    output = subprocess.run(
        [sys.executable, "-c", dedent(script)], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert "another process has it open for writing" in output[0]
    assert output[1] == repr([row(6)])
    store.close()
    assert not is_locked(path)
    opened(path).close()


def test_looking_at_the_lock_does_not_give_it_back(path: Path) -> None:
    """The process that writes may ask who holds the store, and no other gets to write by it."""
    store = opened(path)
    assert not is_locked(path)
    script = f"""
        from pathlib import Path
        from featserve.store import open_store
        open_store(Path({str(path)!r}), "write")
    """
    refused = subprocess.run([sys.executable, "-c", dedent(script)], check=False, capture_output=True, text=True)
    assert "StoreLocked" in refused.stderr
    store.close()


def test_a_reader_beside_the_writer(path: Path) -> None:
    """A read-only opening sees the rows of its moment, whatever the writer does after it, and cannot write."""
    writer = opened(path)
    writer.write_many([b"before"], [row(1)])
    reader = opened(path, "read")
    writer.write_many([b"before", b"after"], [row(2), row(1)])
    with writer.load() as load:
        load.add(KEYS, [row(9) for _ in KEYS])
    writer._opened().compact_range(None, None)
    assert reader.read_many([b"before", b"after", KEYS[0]]) == [row(1), None, row(6)]
    assert all(found is not None for found in reader.read_many(KEYS))
    with pytest.raises(StoreError, match="open for reading"):
        reader.write_many([b"a"], [row(1)])
    with pytest.raises(StoreError, match="open for reading"), reader.load():
        pass
    reader.close()
    writer.close()


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    """Reading a store that was never made says so and makes nothing; writing makes it, folders included."""
    with pytest.raises(StoreError, match=r"there is no store at .*nowhere.*materialize"):
        opened(tmp_path / "nowhere", "read")
    assert not list(tmp_path.iterdir())
    opened(tmp_path / "deep" / "down").close()
    opened(tmp_path / "deep" / "down", "read").close()


def test_a_path_that_cannot_be_a_store(tmp_path: Path) -> None:
    """A file in the place of the store's folder, or of the one above it, is an error of the store."""
    (tmp_path / "file").write_text("not a folder")
    for place in (tmp_path / "file", tmp_path / "file" / "store"):
        with pytest.raises(StoreError, match="file"):
            opened(place)
        with pytest.raises(StoreError, match="there is no store"):
            opened(place, "read")


def foreign(path: Path) -> None:
    database = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    database[b"somebody"] = b"else's"
    database.close()


def foreign_objects(path: Path) -> None:
    database = rocksdict.Rdict(str(path))
    database["somebody"] = {"else": "s"}
    database.close()


def foreign_families(path: Path) -> None:
    database = rocksdict.Rdict(str(path), rocksdict.Options(raw_mode=True))
    database.create_column_family("more", rocksdict.Options(raw_mode=True))[b"a"] = b"b"
    database.close()


def later_format(path: Path) -> None:
    store = opened(path)
    store._opened()[b"\x00featserve"] = b"rows 3"
    store.close()


@pytest.mark.parametrize("access", ["read", "write"])
@pytest.mark.parametrize("make", [foreign, foreign_objects, foreign_families, later_format])
def test_a_database_of_somebody_else(tmp_path: Path, make: Callable[[Path], None], access: str) -> None:
    """A database that featserve did not write, or a later one did, is refused and left as it was."""
    make(tmp_path / "theirs")
    with pytest.raises(StoreError, match=str(tmp_path / "theirs")):
        opened(tmp_path / "theirs", access)
    if make is foreign:
        database = rocksdict.Rdict(str(tmp_path / "theirs"), rocksdict.Options(raw_mode=True))
        assert list(database.items()) == [(b"somebody", b"else's")]
        database.close()


def test_a_failed_load_leaves_no_files(path: Path) -> None:
    """The staged files of a load are removed when it ends, well or badly."""
    store = opened(path)
    with store.load() as load:
        load.add(KEYS[:3], [row(9)] * 3)
        load.add(KEYS[:3], [row(10)] * 3)
        assert len(list(path.parent.glob(".store.load-*"))) == 1

    def interrupted() -> None:
        with store.load() as load:
            load.add(KEYS[:3], [row(11)] * 3)
            load.add(KEYS[:3], [row(12)] * 3)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(path.parent.iterdir()) == [path]
    assert store.read_many(KEYS[:1]) == [row(10)]
    store.close()


def damage(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 0xFF
    file.write_bytes(data)


def uses(path: Path, access: str) -> dict[str, object]:
    """Open a store and use it in every way; return what each gave, an error where it raised one of the tree."""
    results: dict[str, object] = {}
    try:
        store = opened(path, access)
    except StoreError as error:
        return {"open": error}
    try:
        each: dict[str, Callable[[], object]] = {
            "rows": lambda: [store.read_many(KEYS[i : i + 100]) for i in range(0, len(KEYS), 100)],
            "count": lambda: store.count(b"key"),
        }
        if access == "write":
            each["load"] = lambda: load_older(store)
        for name, use in each.items():
            try:
                results[name] = use()
            except StoreError as error:
                results[name] = error
    finally:
        store.close()
    return results


def load_older(store: RocksStore) -> None:
    """Load rows older than all that are there."""
    for first in range(0, len(KEYS), 500):
        with store.load() as load:
            load.add(KEYS[first : first + 1], [row(1)])


def lengths(manifest: bytes) -> set[int]:
    """Return where a manifest says how long its records are: a checksum of 4 bytes, a length of 2, a type, the record.

    One that goes beyond the end of the file RocksDB takes for one that a crash cut off, and goes by those before it.
    """
    places, at = set(), 0
    while at < len(manifest):
        places |= {at + 4, at + 5}
        at += 7 + int.from_bytes(manifest[at + 4 : at + 6], "little")
    return places


@pytest.mark.parametrize("access", ["read", "write"])
def test_damaged_files_are_never_read_as_rows(
    path: Path, tmp_path: Path, access: str, rng: np.random.Generator
) -> None:
    """With a byte of a file of the database flipped, every use gives the right answer or an error that says so."""
    expected = {"rows": None, "count": len(KEYS), "load": None}
    store = opened(path, "read")
    expected["rows"] = [store.read_many(KEYS[i : i + 100]) for i in range(0, len(KEYS), 100)]  # type: ignore[assignment]
    store.close()
    caught = 0
    files = [f for f in sorted(path.iterdir()) if f.suffix == ".sst" or f.name.startswith(("MANIFEST", "CURRENT"))]
    assert len(files) >= 3
    for file in files:
        spared = lengths(file.read_bytes()) if file.name.startswith("MANIFEST") else set()
        for at in rng.choice([at for at in range(file.stat().st_size) if at not in spared], 6).tolist():
            copy = tmp_path / "copy"
            shutil.copytree(path, copy)
            damage(copy / file.name, at)
            for name, got in uses(copy, access).items():
                if isinstance(got, StoreError):
                    caught += 1
                    assert str(copy) in str(got)
                else:
                    assert got == expected[name], name
            shutil.rmtree(copy)
    assert caught > len(files)


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The folder of a store whose process was killed: its rows are in the log alone."""
    path = tmp_path / "killed"
    script = f"""
        import os, signal
        from pathlib import Path
        from featserve.store import open_store
        store = open_store(Path({str(path)!r}), "write", block_cache_mb=8)
        for i in range(300):
            store.write_many([b"key %06d" % i], [b"\\xf5\\x01\\0\\0view" + bytes(24) + b"x" * i])
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", dedent(script)], check=False).returncode == -signal.SIGKILL
    return path


def test_a_damaged_log_is_refused(killed: Path, tmp_path: Path, rng: np.random.Generator) -> None:
    """A flipped byte in the log is an error, never fewer rows; a last record cut short is a write that never was."""
    log = max(killed.glob("*.log"), key=lambda f: f.stat().st_size)
    size = log.stat().st_size
    copy = tmp_path / "copy"
    rows = [match.start() for match in re.finditer(b"view", log.read_bytes())]
    assert len(rows) == 300
    for at in [rows[0], rows[150], rows[-1], size - 1, *rng.choice(rows, 6).tolist()]:
        shutil.copytree(killed, copy)
        damage(copy / log.name, at)
        for access in ("write", "read"):
            with pytest.raises(StoreError, match="damaged"):
                opened(copy, access)
        shutil.rmtree(copy)
    for cut in (1, 100, 320):
        shutil.copytree(killed, copy)
        os.truncate(copy / log.name, size - cut)
        store = opened(copy)
        assert store.count(b"key") == 299
        assert store.read_many(KEYS[298:300]) == [b"\xf5\x01\0\0view" + bytes(24) + b"x" * 298, None]
        store.close()
        shutil.rmtree(copy)


def test_a_store_without_its_current_file(path: Path) -> None:
    """A folder that lost CURRENT is not taken for an empty one: what is in it stays."""
    files = {f.name for f in path.glob("*.sst")}
    (path / "CURRENT").unlink()
    with pytest.raises(StoreError, match="damaged"):
        opened(path)
    assert {f.name for f in path.glob("*.sst")} == files


@pytest.mark.parametrize("what", ["*.sst", "MANIFEST-*"])
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_store_without_one_of_its_files(path: Path, what: str, access: str) -> None:
    """A data file or manifest that is gone is an error of the store."""
    sorted(path.glob(what), key=lambda f: f.stat().st_size)[-1].unlink()
    results = uses(path, access)
    assert any(isinstance(result, StoreError) for result in results.values())
    assert "rows" not in results or isinstance(results["rows"], StoreError)


def test_an_empty_file_of_rows(path: Path) -> None:
    """A data file cut to nothing is an error of the store, not missing rows."""
    for file in path.glob("*.sst"):
        os.truncate(file, 0)
    results = uses(path, "write")
    assert all(isinstance(result, StoreError) for result in results.values())


def test_a_full_disk(small_disk: SmallDisk, rng: np.random.Generator) -> None:
    """A write or load that does not fit is refused as such; what was acknowledged stays, and a new start goes on."""
    path = small_disk.folder / "store"
    store = opened(path)
    store.write_many([b"kept"], [row(1)])
    keys = [b"big %d" % i for i in range(100)]
    with pytest.raises(StoreFull, match="no space left"), store.load() as load:
        load.add(keys, [row(1, rng.bytes(100_000)) for _ in keys])
    assert store.read_many([b"kept", *keys[:2]]) == [row(1), None, None]
    written: list[int] = []
    with pytest.raises(StoreFull, match="no space left"):
        written.extend(store.write_many([key], [row(1, rng.bytes(100_000))]) for key in keys)
    assert store.read_many([b"kept"]) == [row(1)]
    store.close()
    small_disk.enlarge()
    store = opened(path)
    assert store.read_many([b"kept"]) == [row(1)]
    assert [found is not None for found in store.read_many(keys)] == [i < len(written) for i in range(len(keys))]
    assert store.write_many([b"again"], [row(1)]) == 1
    store.close()
