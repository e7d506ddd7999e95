"""What the tests run in a process of its own, so that it can be signalled, killed and measured.

``python -m tests.process serve FOLDER`` serves a project and prints its address once it takes requests.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from featserve.config import load_config
from featserve.errors import FeatserveError
from featserve.server.app import run
from featserve.server.logs import configure


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def end_with_parent() -> None:
    """End when the tests are gone, however they ended: then nobody holds the other end of standard input."""
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGKILL)


def serve(folder: Path) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    configure()
    run(load_config(folder), ready=say)


if __name__ == "__main__":
    verb, folder = sys.argv[1], Path(sys.argv[2])
    try:
        {"serve": serve}[verb](folder)
    except FeatserveError as error:
        sys.exit(f"{error.__class__.__name__}: {error}")
