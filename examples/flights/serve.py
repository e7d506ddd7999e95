"""Leave the example's server running, with what was visible at one instant. ``make serve`` runs it; Ctrl-C ends it."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from examples.flights.project import FOLDER, SERVICE, THEN, THEN_TEXT, command, flights_at, make_afresh
from featserve.config import load_config
from featserve.errors import FeatserveError
from featserve.server.app import run
from featserve.server.logs import configure

KEYS = ("origin", "dest", "carrier", "tailnum")
REQUEST = "scheduled_minutes"

TOLD = """
Listening on {address}, until Ctrl-C. It has what was visible at {then}. Ask it from another terminal:

{get} \\
    --server {address} --as-of {then}

or in Python:

from datetime import datetime
import featserve

with featserve.connect("{address}") as client:
    matrix = client.get(
        "{service}",
        {keys},
        request={request},
        as_of=datetime.fromisoformat("{then}"),
    )
    print(matrix.to_dict())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help="the port to listen on, by default that of featserve.toml; 0: any")
    port = parser.parse_args().port
    config = load_config(FOLDER, {})
    if port is not None:
        config = replace(config, server=replace(config.server, port=port))
    make_afresh()
    command("apply", last=1)
    command("materialize", "--as-of", THEN_TEXT)
    configure()
    try:
        run(config, ready=tell)
    except FeatserveError as error:
        sys.exit(str(error))


def tell(address: str) -> None:
    """Say how to ask the server, in a terminal and in Python."""
    flights = {name: flights_at(THEN).slice(0, 2)[name].to_pylist() for name in (*KEYS, REQUEST)}
    words = [f"{name}={','.join(map(str, values))}" for name, values in flights.items()]
    program = Path(sys.executable).with_name("featserve")
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    keys = {name: flights[name] for name in KEYS}
    print(TOLD.format(
        address=address, get=shlex.join([str(shown), "get", SERVICE, *words]), then=THEN_TEXT,
        service=SERVICE, keys=keys, request={REQUEST: flights[REQUEST]},
    ), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
