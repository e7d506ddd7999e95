"""Generate featserve/_proto from protos/: .proto files come in, Python modules, their stubs and the baseline go out.

The modules are flat (featserve/_proto/serving_pb2.py), while each file keeps its path in protobuf's descriptor pool
(featserve/v1/serving.proto), so that server reflection shows the contract as it is written.

protos/baseline.json is the contract as it was last accepted. A change that would break its clients is refused, unless
the contract was never released and it is let through by name; any other change moves the baseline along.

    python protos/generate.py                     generate, if the change breaks nothing
    python protos/generate.py --accept-breaking   generate, whatever the change breaks
    python protos/generate.py --check             write nothing, fail if what is committed is not current
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent
BASELINE = PROTOS / "baseline.json"
PACKAGE = ROOT / "featserve" / "_proto"
SCRIPTS = Path(sysconfig.get_path("scripts"))
MESSAGES = ("featserve/v1/errors.proto", "featserve/v1/serving.proto")
SERVICES = ("featserve/v1/serving.proto",)
INIT = '"""Messages and stubs generated from protos/ by `make protos`: change the .proto files, never these."""\n'
# What names the module that protoc thinks it writes, and what it is here.
RENAMED = (
    ("from featserve.v1 import ", "from featserve._proto import "),
    ("DESCRIPTOR, 'featserve.v1.", "DESCRIPTOR, 'featserve._proto."),
    ("generated code in featserve/v1/", "generated code in featserve/_proto/"),
)


def generate() -> dict[Path, str]:
    """Return the text of every file that follows from the .proto files, by its path."""
    with tempfile.TemporaryDirectory() as folder:
        protoc = [sys.executable, "-m", "grpc_tools.protoc", f"--proto_path={PROTOS}"]
        plugins = [f"--plugin={name}={SCRIPTS / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
        _run([*protoc, *plugins, f"--python_out={folder}", f"--mypy_out=quiet:{folder}", *MESSAGES])
        _run([*protoc, *plugins, f"--grpc_python_out={folder}", f"--mypy_grpc_out=quiet:{folder}", *SERVICES])
        files = {PACKAGE / path.name: _renamed(path.read_text()) for path in Path(folder, "featserve/v1").iterdir()}
    image = _run([str(SCRIPTS / "buf"), "build", str(PROTOS), "--exclude-source-info", "--output=-#format=json"])
    # buf varies the white space of its JSON from run to run, on purpose.
    baseline = json.dumps(json.loads(image), indent=1) + "\n"
    return {PACKAGE / "__init__.py": INIT, BASELINE: baseline} | files


def stale(expected: dict[Path, str]) -> list[Path]:
    """Return the files that are missing, left over, or unlike what is expected."""
    committed = {path: path.read_text() for path in (BASELINE, *PACKAGE.glob("*")) if path.is_file()}
    return sorted(path for path in expected.keys() | committed.keys() if expected.get(path) != committed.get(path))


def refuse_breaking() -> None:
    """Leave with buf's list of what breaks if the contract is not compatible with the baseline."""
    remedy = "Keep what clients use, or begin featserve.v2; `make protos-accept` lets through what was never released."
    command = [str(SCRIPTS / "buf"), "breaking", str(PROTOS), f"--against={BASELINE}"]
    _run(command, f"protos/ breaks the clients of protos/baseline.json in the ways listed above. {remedy}")


def _run(command: list[str], failure: str = "") -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        print(done.stdout, end="")
        raise SystemExit(failure or f"{' '.join(command[:3])} failed: its message is above")
    return done.stdout


def _renamed(text: str) -> str:
    for old, new in RENAMED:
        text = text.replace(old, new)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate featserve/_proto from protos/.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; fail if what is committed is not current")
    mode.add_argument("--accept-breaking", action="store_true", help="let a change through that breaks clients")
    options = parser.parse_args()
    if not options.accept_breaking:
        refuse_breaking()
    expected = generate()
    paths = stale(expected)
    names = ", ".join(str(path.relative_to(ROOT)) for path in paths)
    if options.check and paths:
        print(f"not what protos/ gives: {names}. Run `make protos` and commit what it writes")
        return 1
    PACKAGE.mkdir(exist_ok=True)
    for path in paths:
        if path in expected:
            path.write_text(expected[path])
        else:
            path.unlink()
    print(f"featserve/_proto and protos/baseline.json are current ({f'written: {names}' if names else 'no change'})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
