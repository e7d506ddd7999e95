"""What installs and what loads: the client alone needs grpcio, protobuf and NumPy, and nothing of the server's."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# typing_extensions is grpcio's own.
CLIENT_PACKAGES = {"featserve", "grpcio", "numpy", "protobuf", "typing_extensions"}
SERVER_MODULES = {"rocksdict", "sqlalchemy", "pyarrow", "click", "rich", "duckdb", "pandas", "polars", "sqlglot"}
LOAD_CLIENT = "import featserve; featserve.connect; featserve.client"


def locked(name: str) -> list[str]:
    """Return the requirements of a lock file, each with its hashes, one a line."""
    lines = (ROOT / name).read_text().replace("\\\n", "").splitlines()
    return [line for line in lines if not line.lstrip().startswith("#")]


def run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_client_loads_no_server_part() -> None:
    """Importing featserve and its client loads none of the server's libraries, though they are installed."""
    loaded = run(sys.executable, "-c", f"import sys; {LOAD_CLIENT}; print(*sys.modules)").split()
    assert not SERVER_MODULES & set(loaded)
    assert {"grpc", "numpy"} <= set(loaded)


def test_every_package_is_pinned_by_hash() -> None:
    """Each line of the locks names one version and its hashes, and what the example runs with is what is tested."""
    everything, example = locked("requirements.lock"), locked("requirements/run.lock")
    for line in everything:
        assert re.fullmatch(r"[\w.-]+==[\w.]+( ;[^\\]+?)?( +--hash=sha256:[0-9a-f]{64})+", line), line[:100]
    assert set(example) < set(everything)


def test_the_second_transport_is_the_version_that_is_tested() -> None:
    """The extra names one version of pygrpc-native, that of the lock, which has its hashes."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    (wanted,) = (package for package in extras["native"] if package.startswith("pygrpc-native"))
    assert re.fullmatch(r"pygrpc-native==[\d.]+", wanted)
    assert [line for line in locked("requirements.lock") if line.startswith(f"{wanted} ")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, from a copy of what is in version control or about to be."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    files = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source)
    return next(folder.glob("featserve-*.whl"))


@pytest.mark.slow
def test_wheel_holds_the_package_and_its_types(wheel: Path) -> None:
    """The wheel holds every module with its types and the licence, and neither tests nor examples."""
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"featserve/py.typed", "featserve/_proto/serving_pb2.pyi", "featserve/_proto/serving_pb2_grpc.pyi"} <= names
    assert {f"featserve/{path.name}" for path in (ROOT / "featserve").glob("*.py")} <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"featserve"}


@pytest.mark.slow
def test_core_install_is_the_client_alone(wheel: Path, tmp_path: Path) -> None:
    """A plain install pulls in three packages; its client loads, its command line says how to get the rest."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    (tmp_path / "versions.txt").write_text(
        "\n".join(line.partition(" --hash")[0] for line in locked("requirements.lock"))
    )
    run(python, "-m", "pip", "install", "--quiet", "--constraint", tmp_path / "versions.txt", wheel)
    installed = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    names = set(run(python, "-c", installed).split()) - {"pip", "setuptools"}
    assert names == CLIENT_PACKAGES
    run(python, "-W", "error", "-c", LOAD_CLIENT)
    done = subprocess.run([tmp_path / "venv" / "bin" / "featserve", "list"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "featserve's command line needs the server parts: pip install 'featserve[server]'\n"
