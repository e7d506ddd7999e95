"""The wire contract: the committed code is what the .proto files give, and no change may break a client."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from featserve._proto import errors_pb2, serving_pb2, serving_pb2_grpc

ROOT = Path(__file__).resolve().parent.parent
SERVING = "protos/featserve/v1/serving.proto"
BREAKING = {
    "a field that is taken away": ("  uint32 stored = 2;\n", ""),
    "a field that gets another number": ("  uint32 stored = 2;", "  uint32 stored = 3;"),
    "a field that gets another type": ("  fixed64 schema_id = 1;", "  uint64 schema_id = 1;"),
    "a field that gets another name": ("  bytes event_times = 7;", "  bytes event_time = 7;"),
    "an enum value that gets another number": ("  STATUS_EXPIRED = 4;", "  STATUS_EXPIRED = 5;"),
    "a call that is taken away": ("  rpc ListServices(ListServicesRequest) returns (ListServicesResponse);\n", ""),
    "a call that becomes a stream": ("returns (GetFeaturesResponse);", "returns (stream GetFeaturesResponse);"),
}


def generate(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(root / "protos" / "generate.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a folder with a copy of protos/ and of the code that was generated from it."""
    shutil.copytree(ROOT / "protos", tmp_path / "protos")
    shutil.copytree(ROOT / "featserve" / "_proto", tmp_path / "featserve" / "_proto")
    shutil.rmtree(tmp_path / "featserve" / "_proto" / "__pycache__", ignore_errors=True)
    return tmp_path


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is in {path} {text.count(old)} times"
    path.write_text(text.replace(old, new))


def test_committed_code_is_current() -> None:
    """The committed code and the baseline are, byte for byte, what the .proto files give."""
    done = generate(ROOT, "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_check_names_what_is_stale(copy: Path) -> None:
    """A generated file that was edited by hand, lost or left over fails the check, by name."""
    package = copy / "featserve" / "_proto"
    with (package / "serving_pb2.py").open("a") as file:
        file.write("# by hand\n")
    (package / "errors_pb2.pyi").unlink()
    (package / "old_pb2.py").write_text("")
    done = generate(copy, "--check")
    assert done.returncode == 1
    names = ("serving_pb2.py", "errors_pb2.pyi", "old_pb2.py")
    assert "not what protos/ gives: " + ", ".join(f"featserve/_proto/{name}" for name in sorted(names)) in done.stdout
    assert generate(copy).returncode == 0
    assert generate(copy, "--check").returncode == 0


@pytest.mark.parametrize("change", BREAKING)
def test_breaking_change_is_refused(copy: Path, change: str) -> None:
    """Nothing that breaks a client passes, and nothing is written for it."""
    old, new = BREAKING[change]
    baseline = (copy / "protos" / "baseline.json").read_text()
    replace(copy / SERVING, old, new)
    done = generate(copy)
    assert done.returncode == 1
    assert "serving.proto" in done.stdout
    assert "breaks the clients" in done.stderr
    assert (copy / "protos" / "baseline.json").read_text() == baseline


def test_addition_moves_the_baseline(copy: Path) -> None:
    """A field that is added passes, and from then on it may not be taken away."""
    added = "  uint32 stored = 2;\n  uint32 late = 99;\n"
    replace(copy / SERVING, "  uint32 stored = 2;\n", added)
    assert generate(copy, "--check").returncode == 1
    assert generate(copy).returncode == 0
    assert generate(copy, "--check").returncode == 0
    replace(copy / SERVING, added, "  uint32 stored = 2;\n")
    assert "breaks the clients" in generate(copy).stderr


def test_breaking_change_can_be_accepted_by_name(copy: Path) -> None:
    """A contract that nobody has yet can be changed in any way, on request."""
    replace(copy / SERVING, *BREAKING["a field that gets another name"])
    assert generate(copy, "--accept-breaking").returncode == 0
    assert generate(copy, "--check").returncode == 0


def test_modules_are_flat_and_paths_are_not() -> None:
    """Messages live in featserve._proto; reflection shows the files under their own paths."""
    assert serving_pb2.Column.__module__ == "featserve._proto.serving_pb2"
    assert serving_pb2.DESCRIPTOR.name == "featserve/v1/serving.proto"
    assert errors_pb2.DESCRIPTOR.name == "featserve/v1/errors.proto"
    service = serving_pb2.DESCRIPTOR.services_by_name["FeatureServingService"]
    assert {method.name for method in service.methods} == {
        name for name in vars(serving_pb2_grpc.FeatureServingServiceServicer) if not name.startswith("_")
    }
