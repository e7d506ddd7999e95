"""Generate featserve/_proto from the .proto files: what comes in is protos/featserve, what goes out is Python and stubs.

`python protos/generate.py` writes the package, `--check` writes nothing and fails where the committed files are not
what the .proto files give. The modules are flat (featserve/_proto/serving_pb2.py), while each file keeps its path in
protobuf's descriptor pool (featserve/v1/serving.proto), so that reflection shows the contract as it is written.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
PACKAGE = PROTOS.parent / "featserve" / "_proto"
MESSAGES = ("featserve/v1/errors.proto", "featserve/v1/serving.proto")
SERVICES = ("featserve/v1/serving.proto",)
INIT = '"""Messages and stubs generated from protos/ by `make protos`: change the .proto files, never these."""\n'
# What names the module that protoc thinks it writes, and what it is here.
RENAMED = (
    ("from featserve.v1 import ", "from featserve._proto import "),
    ("DESCRIPTOR, 'featserve.v1.", "DESCRIPTOR, 'featserve._proto."),
    ("generated code in featserve/v1/", "generated code in featserve/_proto/"),
)


def generate() -> dict[str, str]:
    """Return the text of every file of featserve/_proto by its name."""
    with tempfile.TemporaryDirectory() as folder:
        scripts = Path(sysconfig.get_path("scripts"))
        plugins = [f"--plugin={name}={scripts / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
        _protoc([*plugins, f"--python_out={folder}", f"--mypy_out=quiet:{folder}", *MESSAGES])
        _protoc([*plugins, f"--grpc_python_out={folder}", f"--mypy_grpc_out=quiet:{folder}", *SERVICES])
        files = {path.name: _renamed(path.read_text()) for path in Path(folder, "featserve", "v1").iterdir()}
    return {"__init__.py": INIT} | files


def stale(expected: dict[str, str]) -> list[str]:
    """Return the names of the committed files that are missing, left over, or unlike what is expected."""
    committed = {path.name: path.read_text() for path in PACKAGE.glob("*") if path.is_file()}
    return sorted(name for name in expected.keys() | committed.keys() if expected.get(name) != committed.get(name))


def _protoc(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}", *arguments]
    if subprocess.run(command).returncode != 0:
        raise SystemExit("protoc failed: its message is above")


def _renamed(text: str) -> str:
    for old, new in RENAMED:
        text = text.replace(old, new)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate featserve/_proto from protos/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the committed files are not current")
    check = parser.parse_args().check
    expected = generate()
    names = stale(expected)
    if check and names:
        print(f"featserve/_proto is not what protos/ gives ({', '.join(names)}): run `make protos` and commit it")
        return 1
    PACKAGE.mkdir(exist_ok=True)
    for name in names:
        if name in expected:
            (PACKAGE / name).write_text(expected[name])
        else:
            (PACKAGE / name).unlink()
    print(f"featserve/_proto is current ({len(expected)} files, {len(names)} written)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
