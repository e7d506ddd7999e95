"""The cache of rows: it holds what the store holds or nothing, within its bytes, whatever is written meanwhile."""

from __future__ import annotations

import gc
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from featserve.store import open_store
from featserve.store.cache import ROW_BYTES, RowCache
from featserve.store.rocksdb import RocksStore


def key(number: int) -> bytes:
    return number.to_bytes(4, "big")


def in_memory(cache: RowCache) -> int:
    """Return the bytes of the rows that can be read, counted anew."""
    held = [*cache._young.items(), *cache._old.items()]
    return sum(ROW_BYTES + len(name) + len(row) for name, row in held)


@pytest.mark.parametrize("most_bytes", [0, 900, 5_000, 1 << 20])
def test_it_holds_what_the_store_holds(rng: np.random.Generator, most_bytes: int) -> None:
    """Reads and writes that interleave in any way never leave an old row, and the bytes are kept to and counted."""
    cache, store = RowCache(most_bytes), dict[bytes, bytes]()
    pending: list[tuple[list[bytes], list[bytes | None], int]] = []
    for turn in range(4_000):
        keys = [key(int(number)) for number in rng.integers(0, 60, rng.integers(1, 6))]
        match rng.integers(0, 7):
            case 0 | 1 | 2:  # begin to read what is missing
                rows = cache.get(keys)
                assert all(row is None or row == store[name] for name, row in zip(keys, rows, strict=True))
                missed = [name for name, row in zip(keys, rows, strict=True) if row is None]
                pending.append((missed, [store.get(name) for name in missed], cache.state))
            case 3 | 4:  # end one such read, maybe long after
                if pending:
                    cache.add(*pending.pop(int(rng.integers(len(pending)))))
            case 5:
                cache.begin(set(keys) if rng.random() < 0.9 else None)
                made = {name: rng.bytes(int(rng.integers(0, 99))) if rng.random() < 0.8 else None for name in keys}
                for name, row in made.items():
                    store.pop(name, None)
                    if row is not None:
                        store[name] = row
                if rng.random() < 0.3:  # somebody reads it before the write has ended
                    cache.add(keys, [store.get(name) for name in keys], cache.state)
                told = {name: row if rng.random() < 0.8 else None for name, row in made.items()}
                cache.end(told if rng.random() < 0.95 else None)
            case 6:
                assert {**cache._old, **cache._young}.items() <= store.items(), f"turn {turn}"
                assert not cache._old.keys() & cache._young.keys()
                assert cache._bytes == in_memory(cache) <= most_bytes
    assert cache.misses
    assert bool(cache.hits) == bool(most_bytes)


def test_rows_are_apart_from_a_write_that_changes_others(rng: np.random.Generator) -> None:
    """Whenever reads and writes begin and end, ``apart`` says what a list of the writes met by each read says."""
    cache = RowCache(1 << 20)
    writing: list[set[bytes] | None] = []
    reading: list[tuple[list[bytes], int, list[list[set[bytes] | None]]]] = []
    told = [0, 0]
    for _ in range(8_000):
        keys = [key(int(number)) for number in rng.integers(0, 30, rng.integers(1, 4))]
        match rng.integers(0, 6):
            case 0:
                reading.append((keys, cache.state, [writing] if writing else []))
            case 1 if writing:
                changed = writing[0] if rng.random() < 0.8 else None
                cache.end(None if changed is None else dict.fromkeys(changed))
                writing[0], writing = changed, []
            case 1 | 2 if not writing:
                writing = [set(keys) if rng.random() < 0.9 else None]
                cache.begin(writing[0])
                for _, _, met in reading:
                    met.append(writing)
            case 3 | 4 | 5 if reading:
                keys, state, met = reading.pop(int(rng.integers(len(reading))))
                if met:
                    changed = met[0][0]
                    expected = len(met) == 1 and changed is not None and changed.isdisjoint(keys)
                    assert cache.apart(keys, state) == expected
                    told[expected] += 1
    assert min(told) > 50, told


def test_what_is_read_again_stays() -> None:
    """Of a flood of rows that are read once, none drives out those that are read all the time."""
    cache, row = RowCache(100 * (ROW_BYTES + 4 + 10)), bytes(10)
    hot = [key(number) for number in range(20)]
    cache.add(hot, [row] * 20, cache.state)
    for number in range(1_000, 9_000):
        cache.add([key(number)], [row], cache.state)
        missed = [name for name, found in zip(hot, cache.get(hot), strict=True) if found is None]
        cache.add(missed, [row] * len(missed), cache.state)
    assert cache.misses < 0.05 * cache.hits


def test_rows_that_are_let_go_of_are_freed_little_by_little() -> None:
    """After a load has put everything in doubt no row is found, and each new one frees two, until all are gone."""
    cache = RowCache(1 << 20)
    cache.add([key(number) for number in range(1_000)], [b"row"] * 1_000, cache.state)
    cache.begin(None)
    cache.end(None)
    assert cache.get([key(1)]) == [None]
    left = []
    for number in range(600):
        cache.add([key(number)], [b"new"], cache.state)
        left.append(sum(map(len, cache._left)))
    assert left[:3] == [998, 996, 994]
    assert left[499:] == [0] * 101
    assert cache.get([key(1)]) == [b"new"]


def test_the_garbage_collector_looks_at_no_row() -> None:
    """A cache of many rows makes no collection slower: its dictionaries are not even tracked."""
    cache = RowCache(100 * (ROW_BYTES + 7))
    for number in range(1_000):
        cache.add([key(number)], [b"row"], cache.state)
        cache.get([key(max(number - 50, 0))])
    assert cache._young
    assert cache._old
    assert not gc.is_tracked(cache._young)
    assert not gc.is_tracked(cache._old)


def test_readers_beside_a_writer_never_see_a_row_go_back(tmp_path: Path) -> None:
    """With few rows in the cache and threads that read them while they are written, each row only becomes newer."""
    store = open_store(tmp_path / "store", "write", block_cache_mb=8, row_cache_mb=1)
    keys = [key(number) for number in range(3_000)]
    filler = bytes(600)
    done, went_back, reads = False, list[str](), [0, 0, 0]

    def read(reader: int) -> None:
        random, seen = np.random.default_rng(reader), [0] * len(keys)
        while not done:
            some = random.integers(0, len(keys), 50).tolist()
            for number, row in zip(some, store.read_many([keys[i] for i in some]), strict=True):
                turn = int.from_bytes((row or bytes(32))[8:16], "big")
                if turn < seen[number]:
                    went_back.append(f"key {number}: {seen[number]} and then {turn}")
                seen[number] = turn
            reads[reader] += 1

    threads = [Thread(target=read, args=(reader,)) for reader in range(len(reads))]
    for thread in threads:
        thread.start()
    try:
        random = np.random.default_rng(9)
        for turn in range(1, 400):
            some = random.integers(0, len(keys), 40).tolist()
            row = bytes(8) + turn.to_bytes(8, "big") + bytes(16) + filler
            store.write_many([keys[i] for i in some], [row] * len(some))
            # The writer's own next read has what it wrote, from the cache or not.
            assert all(row and int.from_bytes(row[8:16], "big") == turn for row in store.read_many([keys[some[0]]]))
    finally:
        done = True
        for thread in threads:
            thread.join()
        store.close()
    assert not went_back
    assert min(reads) > 20


def reads_of(store: RocksStore, monkeypatch: pytest.MonkeyPatch) -> list[list[bytes]]:
    """Return a list to which the keys of each later read of RocksDB are added."""
    asked: list[list[bytes]] = []
    read = store._read

    def noted(keys: list[bytes]) -> list[bytes | None]:
        asked.append(keys)
        return read(keys)

    monkeypatch.setattr(store, "_read", noted)
    return asked


def test_a_key_that_repeats_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of keys that are not in the cache each is read from RocksDB once, wherever and however often it stands."""
    store = open_store(tmp_path / "store", "write", block_cache_mb=8, row_cache_mb=1)
    assert isinstance(store, RocksStore)
    store.write_many([key(1), key(2)], [bytes(32), bytes(33)])
    asked = reads_of(store, monkeypatch)
    assert store.read_many([key(1), key(3), key(1), key(2), key(3)]) == [bytes(32), None, bytes(32), bytes(33), None]
    assert store.read_many([key(2), key(2), key(3)]) == [bytes(33), bytes(33), None]
    assert asked == [[key(1), key(3), key(2)], [key(3)]]
    store.close()


def test_a_write_sends_only_readers_of_its_rows_to_rocksdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a row is written, cached rows of other keys are still read from the cache."""
    store = open_store(tmp_path / "store", "write", block_cache_mb=8, row_cache_mb=1)
    assert isinstance(store, RocksStore)
    store.write_many([key(1), key(2), key(3)], [bytes(32), bytes(33), bytes(34)])
    store.read_many([key(1), key(2), key(3)])
    asked = reads_of(store, monkeypatch)
    with store._changing({key(1)}) as cached:
        assert store.read_many([key(2), key(3)]) == [bytes(33), bytes(34)]
        assert not asked
        assert store.read_many([key(1), key(2)]) == [bytes(32), bytes(33)]
        assert asked == [[key(1), key(2)]]
        cached.append({})
    store.close()


def test_a_writer_finds_in_the_cache_what_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows that a write may replace only those are read from RocksDB that are not cached, and none gets in."""
    store = open_store(tmp_path / "store", "write", block_cache_mb=8, row_cache_mb=1)
    assert isinstance(store, RocksStore)
    old, new = bytes(31) + b"1", bytes(31) + b"0"
    store.write_many([key(1), key(2)], [old, old])
    store.read_many([key(1)])
    before = store.cache_lookups()
    asked = reads_of(store, monkeypatch)
    assert store.write_many([key(1), key(2), key(3)], [new, new, new]) == 1
    assert asked == [[key(2), key(3)]]
    assert store.cache_lookups() == before
    assert store.read_many([key(1), key(2), key(3)]) == [old, old, new]
    store.close()
