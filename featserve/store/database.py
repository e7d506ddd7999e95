"""RocksDB through rocksdict: how a database is opened, and what its errors are called.

Rows are in the default column family. The *notes*, keys that the writer alone reads, have one of their own, so that who
follows the database skips them.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import rocksdict

from featserve.errors import StoreError, StoreFull, StoreLocked
from featserve.store import Access

NOTES = "notes"
WRITING: set[Path] = set()
"""The stores that this process has open for writing."""


def keys_of(db: rocksdict.Rdict, first: bytes, wanted: Callable[[bytes], bool]) -> Iterator[bytes]:
    """Yield the keys from ``first`` on while they are ``wanted``."""
    cursor = db.iter()
    cursor.seek(first)
    while cursor.valid() and wanted(key := cursor.key()):
        yield key
        cursor.next()
    cursor.status()  # raises what ended it early: a damaged file looks like the end


def options_of(cache: rocksdict.Cache) -> rocksdict.Options:
    """Return the options of rows; ``cache``: where blocks of files are kept."""
    options = rocksdict.Options(raw_mode=True)
    options.create_if_missing(True)
    table = rocksdict.BlockBasedOptions()
    table.set_block_cache(cache)
    table.set_bloom_filter(10, False)
    table.set_cache_index_and_filter_blocks(False)
    options.set_block_based_table_factory(table)
    options.set_compression_type(rocksdict.DBCompressionType.lz4())
    # LZ4's acceleration: rows of random floats, which do not shrink, are written twice as fast; others shrink a little
    # less.
    options.set_compression_options(-14, -16, 0, 0)
    options.set_keep_log_file_num(4)
    # What is written goes to a skip list in memory, which costs by its size: in one of 4 MiB a follower inserts rows in
    # two thirds of the time that one of 64 takes. A filter stands in front of each; sixteen make one file.
    options.set_write_buffer_size(4 << 20)
    options.set_min_write_buffer_number_to_merge(16)
    options.set_max_write_buffer_number(32)
    options.set_memtable_whole_key_filtering(True)
    options.set_memtable_prefix_bloom_ratio(0.02)
    # The default drops, without a word, every row logged after a damaged one; this drops a last one cut short, no more.
    options.set_wal_recovery_mode(rocksdict.DBRecoveryMode.tolerate_corrupted_tail_records())
    return options


def open_database(
    path: Path,
    options: rocksdict.Options,
    access: Access,
    *,
    notes: rocksdict.Options | None = None,
    messages: str = "",
) -> rocksdict.Rdict:
    """Open a database. ``notes``: the options of its notes, None to leave those closed, as all do that do not write.

    ``messages``: the folder that a follower keeps its log of messages in.
    """
    kinds = rocksdict.AccessType
    kind = {"write": kinds.read_write, "read": kinds.read_only, "follow": lambda: kinds.secondary(messages)}[access]()
    if not (path / "CURRENT").is_file():
        return rocksdict.Rdict(str(path), options)
    # Without the column family's own options an existing database runs with an 8 MiB cache: 150 times slower reads.
    families = {"default": options}
    if notes is not None and NOTES in rocksdict.Rdict.list_cf(str(path), options):
        families[NOTES] = notes
    return rocksdict.Rdict(str(path), options, column_families=families, access_type=kind)


def ingest(db: rocksdict.Rdict, files: list[Path]) -> None:
    """Make the rows of files visible, in one step; the files are the database's then."""
    options = rocksdict.IngestExternalFileOptions()
    options.set_move_files(True)
    db.ingest_external_file([str(file) for file in files], options)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn what RocksDB and the file system raise into errors of the tree, with ``what`` in front."""
    try:
        yield
    except StoreError:
        raise
    except Exception as error:
        raise translate(error, what) from error


def translate(error: Exception, what: str) -> StoreError:
    text = str(error)
    if isinstance(error, AttributeError):
        return StoreError(f"{what}: the store is closed")
    if "LOCK" in text or "lock hold" in text:
        return StoreLocked(
            f"{what}: another process has it open for writing. Stop that server, or send the rows to it "
            "(`featserve materialize --to HOST:PORT`)"
        )
    if "No space left" in text or getattr(error, "errno", None) == 28:
        return StoreFull(f"{what}: no space left on the device. Free some and start again; what was written is kept")
    if "Corruption" in text:
        return StoreError(f"{what}: it is damaged ({text}). Restore it, or remove the folder and materialize again")
    return StoreError(f"{what}: {text}")


def is_locked(path: Path) -> bool:
    """Say whether another process holds RocksDB's lock on folder ``path``."""
    if path.resolve() in WRITING:
        return False  # and closing its lock file would give back the lock that this process has
    try:
        with (path / "LOCK").open("rb") as lock:
            fcntl.lockf(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # given back when the file is closed
    except FileNotFoundError:
        return False
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return True
        raise translate(error, f"cannot look at the store at {path}") from error
    return False
