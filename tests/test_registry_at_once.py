"""Applies at the same time as others, and applies that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from textwrap import dedent
from typing import TYPE_CHECKING, Any

import pytest

from featserve.errors import RegistryConflict
from featserve.registry import Load, Registry
from tests.declarations import NOW_US, declare, view

if TYPE_CHECKING:
    pass

pytest_plugins = ["tests.postgres"]


def test_applies_at_once_both_land(registry_url: str) -> None:
    """Threads that create the registry and apply different definitions all at once all land, in one order."""
    start = threading.Barrier(6, timeout=30)

    def apply(number: int) -> None:
        start.wait()
        with Registry.open(registry_url) as registry:
            for version in range(1, 6):
                registry.apply(declare(view(f"v{number}", version)), str(number), NOW_US)

    run_threads(apply, 6)
    with Registry.open(registry_url) as registry:
        assert set(registry.snapshot().views) == {f"v{n}@{v}" for n in range(6) for v in range(1, 6)}
        revisions = [entry.revision for entry in registry.history()]
        assert len(revisions) == 1 + 30
        assert revisions == sorted(set(revisions))


def test_conflicting_applies_at_once_land_one(registry_url: str) -> None:
    """Of several meanings for one version applied at once, exactly one lands, and the others are conflicts."""
    landed: list[int] = []
    refused: list[int] = []
    start = threading.Barrier(4, timeout=30)
    with Registry.open(registry_url) as shared:

        def apply(number: int) -> None:
            for version in range(1, 11):
                start.wait()
                ttl = timedelta(seconds=number + 1)
                try:
                    shared.apply(declare(view("v", version, ttl=ttl)), str(number), NOW_US)
                    landed.append(number)
                except RegistryConflict:
                    refused.append(number)

        run_threads(apply, 4)
        assert (len(landed), len(refused)) == (10, 30)
        winners = {e.id: e.who for e in shared.history("v")}
        assert {v.id: str(round((v.ttl_us or 0) / 1e6) - 1) for v in shared.snapshot().views.values()} == winners


def run_threads(target: Any, count: int) -> None:
    with ThreadPoolExecutor(count) as pool:
        for done in [pool.submit(target, number) for number in range(count)]:
            done.result()


WRITER = dedent("""
    import sys
    from featserve.registry import Registry
    from tests.declarations import NOW_US, declare, view

    with Registry.open(sys.argv[1]) as registry:
        for version in range(int(sys.argv[2]), 1_000_000):
            registry.apply(declare(*(view(f"v{i}", version) for i in range(8))), "killed", NOW_US)
            print(version, flush=True)
""")


def start_writer(registry_url: str, first: int, name: str = "v") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", WRITER.replace('f"v', f'f"{name}'), registry_url, str(first)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    )


def killed_after(writer: subprocess.Popen[str], applies: int, delay: float) -> int:
    """Kill a writer ``delay`` seconds into an apply after ``applies`` of them; return the last version acknowledged."""
    assert writer.stdout is not None
    for _ in range(applies):
        assert writer.stdout.readline()
    try:
        writer.wait(delay)
    except subprocess.TimeoutExpired:
        writer.send_signal(signal.SIGKILL)
    rest = writer.stdout.read().split("\n")[:-1]
    writer.wait()
    writer.stdout.close()
    assert writer.returncode == -signal.SIGKILL
    return int(rest[-1]) if rest else -1


@pytest.mark.slow
def test_kill_in_the_middle_of_an_apply(registry_url: str, seed: int) -> None:
    """After kill -9 at any moment the registry opens, holds all that was acknowledged, and no apply in part."""
    chance = random.Random(seed)
    first = 1
    for _ in range(6):
        acknowledged = killed_after(start_writer(registry_url, first), 2, chance.uniform(0, 0.05))
        acknowledged = max(acknowledged, first + 1)
        with Registry.open(registry_url, create=False) as registry:
            versions = [item.version for item in registry.snapshot().views.values()]
            last = max(versions)
            assert last in (acknowledged, acknowledged + 1)
            assert sorted(versions) == sorted(list(range(1, last + 1)) * 8)
            assert len(registry.history()) == 1 + 8 * last
            registry.record_load(Load("v0@1", 0, 0, 0, 0, "the killed writer holds no lock", 0.0))
        first = last + 1


@pytest.mark.slow
def test_two_processes_apply_at_once(registry_url: str) -> None:
    """Two processes that apply different definitions at once both get through, over and over."""
    Registry.open(registry_url).close()
    writers = [start_writer(registry_url, 1, name) for name in ("a", "b")]
    last = [killed_after(writer, 10, 0.01) for writer in writers]
    with Registry.open(registry_url, create=False) as registry:
        for name, version in zip("ab", last, strict=True):
            assert registry.snapshot().view(f"{name}7").version >= max(version, 10)
