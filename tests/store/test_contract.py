"""What every ``OnlineStore`` promises, over each of them, against a dictionary that keeps the greatest stamp."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

from featserve.errors import StoreError
from featserve.store import OnlineStore, Writes, open_store, rocksdb
from featserve.store.follow import Follower
from featserve.store.memory import MemoryStore
from tests.serving import PATIENCE_S

Stamp = tuple[int, int, int]

# Ties in the first coordinate, in the first two, and in all three: of the last two rows the later to arrive stays.
HISTORY: tuple[tuple[Stamp, bytes], ...] = (
    ((5, 1, 1), b"old"),
    ((5, 2, -(2**63)), b"known later"),
    ((5, 2, 9), b"one of two"),
    ((5, 2, 9), b"two of two"),
)


def row(stamp: Stamp, payload: bytes = b"") -> bytes:
    """Return a row of any view: eight bytes, the stamp so that bytes compare as the numbers do, and the rest."""
    return b"\xf5\x01\0\0view" + b"".join((n + 2**63).to_bytes(8, "big") for n in stamp) + payload


class Model:
    """A store as a dictionary, row by row."""

    def __init__(self) -> None:
        self.rows: dict[bytes, tuple[Stamp, bytes]] = {}

    def add(self, key: bytes, stamp: Stamp, payload: bytes) -> None:
        if key not in self.rows or self.rows[key][0] <= stamp:
            self.rows[key] = (stamp, payload)

    def expected(self, keys: Sequence[bytes]) -> list[bytes | None]:
        return [row(*self.rows[key]) if key in self.rows else None for key in keys]


@pytest.fixture(params=["memory", "rocksdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[OnlineStore]:
    """A store of each kind, empty."""
    opened = MemoryStore() if request.param == "memory" else open_store(tmp_path / "store", "write", block_cache_mb=8)
    yield opened
    opened.close()


def groupings(rows: int) -> list[list[list[int]]]:
    """Return every order of ``rows`` rows, cut in every way into batches that arrive one after the other."""
    found = []
    for order in permutations(range(rows)):
        for cuts in product((False, True), repeat=rows - 1):
            groups = [[order[0]]]
            for i, cut in zip(order[1:], cuts, strict=True):
                groups[len(groups) :] = [[i]] if cut else []
                groups[-1] += [] if cut else [i]
            found.append(groups)
    return found


def arrivals(step: int, groups: Sequence[list[list[int]]]) -> list[tuple[bytes, Stamp, bytes]]:
    """Return the rows that arrive at one step, each grouping under a key of its own."""
    return [
        (b"key %d" % key, *HISTORY[i])
        for key, grouping in enumerate(groups)
        if step < len(grouping)
        for i in grouping[step]
    ]


def test_a_key_that_was_never_written_has_no_row(store: OnlineStore) -> None:
    """Rows come back in the order of the keys that are asked for, repeats included, None where there is none."""
    assert store.read_many([b"a"]) == [None]
    assert store.read_many([]) == []
    assert store.write_many([b"a", b"b"], [row((1, 1, 1), b"x"), row((1, 1, 1))]) == 2
    assert store.read_many([b"b", b"c", b"a", b"b"]) == [
        row((1, 1, 1)), None, row((1, 1, 1), b"x"), row((1, 1, 1)),
    ]  # fmt: skip


def test_nothing_to_write(store: OnlineStore) -> None:
    """An empty write and an empty load do nothing."""
    assert store.write_many([], []) == 0
    with store.load() as load:
        load.add([], [])
    assert load.stored == 0
    assert store.count(b"") in (0, 1)  # a store may hold a mark of its own


def test_keys_are_bytes_of_any_kind(store: OnlineStore) -> None:
    """Keys that start alike, hold NULs or are long are different keys."""
    keys = [b"a", b"a\0", b"a\0\0", b"ab", b"\0", b"\xff" * 9, b"k" * 8_000, b"k" * 8_001]
    rows: list[bytes | None] = [row((0, 0, i), b"r" * i) for i in range(len(keys))]
    store.write_many(keys, [r for r in rows if r])
    assert store.read_many(keys) == rows


def test_a_row_may_be_large(store: OnlineStore) -> None:
    """A row of 8 MiB is written, loaded and read back."""
    big = row((1, 1, 1), bytes(8 << 20))
    store.write_many([b"written"], [big])
    with store.load() as load:
        load.add([b"loaded"], [big])
    assert store.read_many([b"written", b"loaded"]) == [big, big]


def test_writes_in_every_order_and_batching(store: OnlineStore) -> None:
    """Whatever the order of arrival, one at a time or together, the greatest stamp stays, of equal ones the last."""
    groups, model = groupings(len(HISTORY)), Model()
    keys = [b"key %d" % i for i in range(len(groups))]
    for step in range(len(HISTORY)):
        batch = arrivals(step, groups)
        before = dict(model.rows)
        for key, stamp, payload in batch:
            model.add(key, stamp, payload)
        newest = {key: (stamp, payload) for key, stamp, payload in batch if model.rows[key] == (stamp, payload)}
        stored = store.write_many([key for key, _, _ in batch], [row(s, p) for _, s, p in batch])
        assert stored == len(newest) >= sum(before.get(key) != model.rows[key] for key in model.rows)
        assert store.read_many(keys) == model.expected(keys)


def test_loads_in_every_order_and_batching(store: OnlineStore) -> None:
    """The same for the chunks of one load, and for another load of the same rows over it."""
    groups, model = groupings(len(HISTORY)), Model()
    keys = [b"key %d" % i for i in range(len(groups))]
    for _ in range(2):
        with store.load() as load:
            for step in range(len(HISTORY)):
                batch = arrivals(step, groups)
                load.add([key for key, _, _ in batch], [row(s, p) for _, s, p in batch])
        for step in range(len(HISTORY)):
            for key, stamp, payload in arrivals(step, groups):
                model.add(key, stamp, payload)
        assert store.read_many(keys) == model.expected(keys)


def test_writes_before_during_and_after_a_load(store: OnlineStore) -> None:
    """A load ends as if all its rows had been written at its end; until then only what was written is visible."""
    phases = ["written before", "loaded", "written during", "loaded later", "written at the end", "written after"]
    cases = list(product(phases, repeat=3))
    keys = [b"key %d" % i for i in range(len(cases))]
    rows = [HISTORY[0], *HISTORY[2:]]
    model = Model()

    def in_phase(phase: str) -> list[tuple[bytes, Stamp, bytes]]:
        return [(key, *rows[i]) for key, case in zip(keys, cases, strict=True) for i in range(3) if case[i] == phase]

    def write(phase: str) -> None:
        batch = in_phase(phase)
        store.write_many([key for key, _, _ in batch], [row(s, p) for _, s, p in batch])
        for item in batch:
            model.add(*item)
        assert store.read_many(keys) == model.expected(keys)

    write("written before")
    with store.load() as load:
        for phase in phases[1:5]:
            if phase.startswith("loaded"):
                batch = in_phase(phase)
                load.add([key for key, _, _ in batch], [row(s, p) for _, s, p in batch])
                assert store.read_many(keys) == model.expected(keys)
            else:
                write(phase)
    for item in in_phase("loaded") + in_phase("loaded later"):
        model.add(*item)
    assert store.read_many(keys) == model.expected(keys)
    write("written after")


def test_a_load_that_fails_leaves_nothing(store: OnlineStore) -> None:
    """An error in the middle of a load leaves the rows as they were."""
    store.write_many([b"a"], [row((1, 1, 1), b"before")])

    def load_some() -> None:
        with store.load() as load:
            load.add([b"a", b"b"], [row((2, 2, 2)), row((2, 2, 2))])
            load.add([b"b", b"c"], [row((3, 3, 3)), row((3, 3, 3))])
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        load_some()
    assert store.read_many([b"a", b"b", b"c"]) == [row((1, 1, 1), b"before"), None, None]
    assert store.write_many([b"b"], [row((1, 1, 1))]) == 1


def test_a_load_counts_the_entities_it_stored(store: OnlineStore) -> None:
    """``stored`` counts, at the end of a load, each entity whose newest row the load brought, once."""
    store.write_many([b"newer", b"older"], [row((9, 9, 9)), row((1, 1, 1))])
    with store.load() as load:
        load.add([b"newer", b"older", b"new", b"new"], [row((5, 5, i)) for i in range(4)])
        load.add([b"older", b"new", b"late"], [row((6, 6, 6)), row((2, 2, 2)), row((5, 5, 5))])
        store.write_many([b"late"], [row((7, 7, 7))])
    assert load.stored == 2


def test_two_loads_at_once(store: OnlineStore) -> None:
    """Loads that overlap in time keep the order of stamps between them."""
    with store.load() as first:
        first.add([b"a", b"b"], [row((1, 1, 1), b"first"), row((9, 9, 9), b"first")])
        with store.load() as second:
            second.add([b"a", b"b"], [row((2, 2, 2), b"second"), row((8, 8, 8), b"second")])
    assert store.read_many([b"a", b"b"]) == [row((2, 2, 2), b"second"), row((9, 9, 9), b"first")]


def test_count_and_size(store: OnlineStore, rng: np.random.Generator) -> None:
    """Keys are counted by prefix, and the size grows with the rows."""
    empty = store.size_bytes()
    keys = [bytes([prefix]) + b"%d" % i for prefix in (1, 2, 255) for i in range(prefix)]
    store.write_many(keys, [row((1, 1, 1), rng.bytes(1_000)) for _ in keys])
    with store.load() as load:
        load.add([b"\x01load", *keys[:1]], [row((2, 2, 2)), row((2, 2, 2))])
    assert [store.count(bytes([prefix])) for prefix in (1, 2, 3, 255)] == [2, 2, 0, 255]
    assert store.size_bytes() > empty + 100_000


def test_random_history_equals_the_model(store: OnlineStore, rng: np.random.Generator) -> None:
    """Thousands of writes and loads of several chunks, about the same keys, end with the greatest stamps."""
    model = Model()
    keys = [b"key %d" % i for i in range(3_000)]
    for _ in range(4):
        loaded: list[tuple[bytes, Stamp, bytes]] = []
        with store.load() as load:
            for _ in range(4):
                chunk = random_rows(rng, keys, 2_000)
                load.add([key for key, _, _ in chunk], [row(s, p) for _, s, p in chunk])
                loaded += chunk
                written = random_rows(rng, keys, int(rng.integers(0, 40)))
                store.write_many([key for key, _, _ in written], [row(s, p) for _, s, p in written])
                for item in written:
                    model.add(*item)
        for item in loaded:
            model.add(*item)
        assert store.read_many(keys) == model.expected(keys)


@pytest.mark.parametrize("file_bytes", [1 << 30, 2_000])
def test_a_load_of_sorted_chunks(
    store: OnlineStore, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, file_bytes: int
) -> None:
    """Chunks that follow each other in the order of keys, run after run, keep the order of stamps as any others do."""
    monkeypatch.setattr(rocksdb, "FILE_BYTES", file_bytes)
    model = Model()
    keys = [b"key %05d" % i for i in range(1_200)]
    loaded: list[tuple[bytes, Stamp, bytes]] = []
    written = random_rows(rng, keys, 200)
    store.write_many([key for key, _, _ in written], [row(s, p) for _, s, p in written])
    for item in written:
        model.add(*item)
    with store.load() as load:
        for run in range(3):
            for first in range(0, len(keys), 100):
                stamps = rng.integers(-2, 3, size=(100, 3)).tolist()
                chunk = [
                    (key, (a, b, c), b"run %d" % run) for key, (a, b, c) in zip(keys[first:], stamps, strict=False)
                ]
                chunk = chunk[: int(rng.integers(0, 101))]
                load.add([key for key, _, _ in chunk], [row(s, p) for _, s, p in chunk])
                loaded += chunk
                if rng.random() < 0.2:
                    written = random_rows(rng, keys, 3)
                    store.write_many([key for key, _, _ in written], [row(s, p) for _, s, p in written])
                    for item in written:
                        model.add(*item)
    for item in loaded:
        model.add(*item)
    assert store.read_many(keys) == model.expected(keys)
    assert load.stored == sum(payload.startswith(b"run") for _, payload in model.rows.values())


def random_rows(rng: np.random.Generator, keys: Sequence[bytes], rows: int) -> list[tuple[bytes, Stamp, bytes]]:
    """Return rows about a run of the keys, with many ties."""
    first = int(rng.integers(len(keys)))
    stamps = rng.integers(-2, 3, size=(rows, 3)).tolist()
    return [
        (keys[(first + int(offset)) % len(keys)], (a, b, c), rng.bytes(6))
        for offset, (a, b, c) in zip(rng.integers(0, 1_500, size=rows), stamps, strict=True)
    ]


def test_writers_and_a_load_at_once(store: OnlineStore, rng: np.random.Generator) -> None:
    """Threads that write the same keys during loads lose nothing: every key ends with its greatest stamp."""
    keys = [b"key %d" % i for i in range(200)]
    numbers = rng.permutation(4 * 50 * len(keys)).reshape(4, 50, len(keys))  # every stamp once
    failed: list[BaseException] = []

    def write(part: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> None:
        try:
            for stamps in part:
                store.write_many(keys, [row((int(n), 0, 0)) for n in stamps])
        except BaseException as error:  # noqa: BLE001 - shown by the assertion below
            failed.append(error)

    threads = [threading.Thread(target=write, args=(part,)) for part in numbers[:3]]
    for thread in threads:
        thread.start()
    for half in (numbers[3, :25], numbers[3, 25:]):
        with store.load() as load:
            for stamps in half:
                load.add(keys, [row((int(n), 0, 0)) for n in stamps])
    for thread in threads:
        thread.join()
    assert not failed
    assert store.read_many(keys) == [row((int(n), 0, 0)) for n in numbers.max(axis=(0, 1))]


@pytest.mark.parametrize("follows", [False, True])
def test_what_is_written_together_is_read_together(store: OnlineStore, tmp_path: Path, follows: bool) -> None:
    """While threads read, rows that every write replaces together are of one write in every answer.

    So they are where the reads are of a follower that another thread lets catch up.
    """
    if isinstance(store, MemoryStore) and follows:
        return  # nobody follows what is not on a disk
    keys = [b"key %d" % i for i in range(8)]
    done, torn, reads = threading.Event(), list[list[bytes | None]](), [0, 0]
    seen: set[bytes | None] = set()
    store.update(keys, lambda found: Writes(dict.fromkeys(keys, b"0")))
    read_from = open_store(tmp_path / "store", "follow", block_cache_mb=8) if follows else store
    follower = Follower(read_from, every_s=0.0002) if follows else None

    def read(reader: int) -> None:
        while not done.is_set():
            rows = read_from.read_many(keys)
            reads[reader] += 1
            seen.update(rows)
            if len(set(rows)) > 1:
                torn.append(rows)

    readers = [threading.Thread(target=read, args=(reader,)) for reader in range(len(reads))]
    for thread in readers:
        thread.start()
    for n in range(5_000):
        store.update(keys[:1], lambda found, n=n: Writes(dict.fromkeys(keys, b"%d" % n)))  # type: ignore[misc]
    if follower is not None:
        follower.reached(store.sequence(), PATIENCE_S).result()
        follower.close()
    done.set()
    for thread in readers:
        thread.join()
    read_from.close()
    assert torn == []
    assert min(reads) > 0
    assert len(seen) > 2 or not follows, "nobody read while it caught up"


def test_readers_never_see_a_row_vanish_or_grow_older(store: OnlineStore) -> None:
    """While loads are committed over writes, a reader sees stamps that only ever grow."""
    keys = [b"key %d" % i for i in range(50)]
    store.write_many(keys, [row((0, 0, 0)) for _ in keys])
    done = threading.Event()
    seen: list[str] = []

    def read() -> None:
        last: list[bytes] = [b""] * len(keys)
        while not done.is_set():
            for i, found in enumerate(store.read_many(keys)):
                if found is None or found < last[i]:
                    seen.append(f"{keys[i]!r} went from {last[i].hex()} to {found and found.hex()}")
                last[i] = found or last[i]

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(1, 15):
        with store.load() as load:
            load.add(keys, [row((2 * n, 0, 0)) for _ in keys])
            store.write_many(keys[::2], [row((2 * n + 1, 0, 0)) for _ in keys[::2]])
    done.set()
    reader.join()
    assert not seen


def test_writes_are_numbered(store: OnlineStore) -> None:
    """Each batch and each load that changes something raises the number by one, and no other does."""
    first = store.sequence()
    store.write_many([b"a", b"b"], [row((2, 2, 2))] * 2)
    assert store.sequence() == first + 1
    store.write_many([b"a"], [row((1, 1, 1))])
    with store.load() as load:
        load.add([b"a"], [row((1, 1, 1))])
    assert store.sequence() == first + 1
    with store.load() as load:
        load.add([b"a", b"c"], [row((3, 3, 3))] * 2)
        load.add([b"d"], [row((3, 3, 3))])
    store.catch_up()
    assert store.sequence() == first + 2
    assert len(bytes.fromhex(store.identity())) == 4


def test_closed(store: OnlineStore) -> None:
    """A store that is closed says so, whatever it is asked; closing it again is allowed."""
    store.close()
    store.close()
    for use in (
        lambda: store.read_many([b"a"]),
        lambda: store.write_many([b"a"], [row((1, 1, 1))]),
        lambda: store.count(b""),
        lambda: store.load().__enter__(),
    ):
        with pytest.raises(StoreError, match=r"the store.* is closed"):
            use()


def test_an_update_sees_what_is_there_and_writes_all_of_its_change(store: OnlineStore) -> None:
    """It is given the row of each key, puts and removes whatever the stamps, and where it raises nothing is written."""
    store.write_many([b"a", b"b"], [row((9, 9, 9), b"a"), row((9, 9, 9), b"b")])
    before = store.sequence()
    seen: list[list[bytes | None]] = []

    def change(found: list[bytes | None]) -> Writes:
        seen.append(found)
        return Writes({b"a": row((1, 1, 1), b"new"), b"b": None, b"c": b"short", b"not asked": b""})

    store.update([b"b", b"c"], change)
    assert seen == [[row((9, 9, 9), b"b"), None]]
    assert store.read_many([b"a", b"b", b"c", b"not asked"]) == [row((1, 1, 1), b"new"), None, b"short", b""]
    assert store.sequence() == before + 1
    with pytest.raises(ZeroDivisionError):
        store.update([b"a"], lambda found: Writes({b"a": None, b"c": bytes(1 // 0)}))
    store.update([b"a"], lambda found: Writes({}))
    assert store.read_many([b"a"]) == [row((1, 1, 1), b"new")]
    assert store.sequence() == before + 1


def test_updates_of_many_threads_are_as_if_one_came_after_the_other(store: OnlineStore) -> None:
    """Four threads add one to a number a hundred times each, while another holds updates off: none is lost."""

    def add() -> None:
        for _ in range(100):
            store.update([b"n"], lambda found: Writes({b"n": bytes(len(found[0] or b"") + 1)}))

    threads = [threading.Thread(target=add) for _ in range(4)]
    with store.updating():
        for thread in threads:
            thread.start()
        store.update([b"n"], lambda found: Writes({b"n": b"12345"}))  # its own go through
        assert store.read_many([b"n"]) == [b"12345"]
    for thread in threads:
        thread.join()
    assert store.read_many([b"n"]) == [bytes(405)]


def test_keys_come_in_order(store: OnlineStore) -> None:
    """From the first on, before the end."""
    names = [bytes([1, n]) for n in (0, 3, 7, 255)]
    store.write_many([*names, b"\x02"], [row((1, 1, 1))] * 5)
    assert list(store.keys(b"\x01", b"\x02")) == names
    assert list(store.keys(b"\x01\x03", b"\x01\x07")) == [names[1]]


@pytest.mark.parametrize("count", [3, 2_000])
def test_notes_are_there_once_the_update_is(store: OnlineStore, count: int) -> None:
    """Few or many, and it is one write."""
    before, names = store.sequence(), [b"\x01" + n.to_bytes(2 + n % 3, "big") for n in range(count)]
    store.update([], lambda found: Writes({b"a": b"row"}, note=names))
    assert store.noted(names) == [True] * count
    assert list(store.notes(b"", b"\xff")) == sorted(names)
    assert store.sequence() == before + 1
    store.update([], lambda found: Writes({}, forget=names[1:]))
    assert list(store.notes(b"", b"\xff")) == names[:1]


def test_notes_are_made_and_removed_with_rows(store: OnlineStore) -> None:
    """Notes come and go in the update that says so, or not at all, and are no rows; a load leaves them alone."""
    before, names = store.sequence(), [bytes([1, n]) for n in (0, 3, 7, 255)]
    store.update([], lambda found: Writes({b"a": b"row"}, note=[*names, b"\x02"]))
    store.update([], lambda found: Writes({}, forget=[names[1], b"never"], note=[b"\x01\x80"]))
    assert store.sequence() == before + 2
    with pytest.raises(ZeroDivisionError):
        store.update([], lambda found: Writes({b"a": None}, forget=names, note=[bytes(1 // 0)]))
    with store.load() as load:
        load.add(names[:1], [row((1, 1, 1))])
    assert store.noted([*names, b"a"]) == [True, False, True, True, False]
    assert list(store.notes(b"\x01", b"\x02")) == [names[0], names[2], b"\x01\x80", names[3]]
    assert list(store.notes(b"\x01\x01", b"\x01\xff")) == [names[2], b"\x01\x80"]
    assert store.read_many([*names, b"\x02", b"a"]) == [row((1, 1, 1)), None, None, None, None, b"row"]
