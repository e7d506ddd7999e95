"""Memory limits: what is a size, and what is refused before an engine sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from featserve.errors import DefinitionError
from featserve.offline import Engine, memory, open_engine
from featserve.offline.memory import machine_mebibytes, mebibytes


@pytest.mark.parametrize(("size", "expected"), [("1M", 1), ("500mb", 500), (" 4 GB ", 4096), ("2g", 2048)])
def test_sizes(size: str, expected: int) -> None:
    """Sizes are written as people write them, and mean the same to every engine."""
    assert mebibytes(size) == expected


@pytest.mark.parametrize(
    "size", ["", "lots", "4", "0G", "-1G", "1.5G", "4T", "4GiBs", "50%", "1e3M", 4, "9" * 40 + "G"]
)
@pytest.mark.parametrize("engine", ["duckdb", "spark"])
def test_what_is_no_size_is_refused(engine: Engine, size: str) -> None:
    """A limit that is no size is an error that says what one is, before the engine starts."""
    with pytest.raises(DefinitionError, match=r"memory limit .* is not a size as in 4G or 500M"):
        open_engine(engine, memory_limit=size)


def test_less_than_spark_starts_with() -> None:
    """A limit too small for a Java that Spark could start in is refused with the least that is enough."""
    with pytest.raises(DefinitionError, match=r"'100M' is too little for Spark; the least that it takes is 512M"):
        open_engine("spark", memory_limit="100M")


def test_a_container_has_its_own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container with a limit, that is the machine's memory; without one it is the machine's own."""
    monkeypatch.setattr(memory, "CONTAINER_LIMIT", tmp_path / "memory.max")
    whole = machine_mebibytes()
    assert whole > 256
    for limit, expected in (("max\n", whole), (f"{256 << 20}\n", 256), (f"{2**60}\n", whole)):
        (tmp_path / "memory.max").write_text(limit)
        assert machine_mebibytes() == expected
