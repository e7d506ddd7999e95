"""One process of several: ``python -m featserve.server.worker``, as ``workers`` starts it and no person does.

Comes in, on standard input: a configuration and what part of the server this is. Goes out, on standard output: a line
of JSON once the modules are loaded, and one once it serves, or cannot.
"""

from __future__ import annotations

import json
import os
import pickle
import sys

import uvloop

from featserve.errors import FeatserveError
from featserve.server.app import serve
from featserve.server.logs import configure
from featserve.server.workers import Part


def say(**what: str) -> None:
    """Tell the parent something."""
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Be what the parent says until it says to stop; return the exit code."""
    say(state="loaded")
    try:
        config, part = pickle.load(sys.stdin.buffer)
    except EOFError:  # the parent has changed its mind, or is gone
        return 0
    assert isinstance(part, Part)
    configure(worker=part.number, process=os.getpid())
    try:
        uvloop.run(serve(config, lambda address: say(address=address), part))
    except FeatserveError as error:
        say(reason=error.reason, message=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
