"""The way in from a terminal (`featserve`, `python -m featserve`): start the command line, or say what it lacks.

The client alone installs without the server's parts, so this module must load where they are absent.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec

SERVER_PARTS = ("click", "pyarrow", "rich", "rocksdict", "sqlalchemy")


def main() -> int:
    """Run the command line; return the exit code 2 where the parts that it needs are not installed."""
    if not all(find_spec(name) for name in SERVER_PARTS):
        print("featserve's command line needs the server parts: pip install 'featserve[server]'", file=sys.stderr)
        return 2
    from featserve.cli import main as run

    run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
