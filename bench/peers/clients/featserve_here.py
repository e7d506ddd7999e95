"""featserve in process: the project opened, and no server."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import featserve
from bench.peers.clients.driver import BLOCK, serve
from bench.project import ENTITIES, KEY, SERVICE


class Embedded:
    """The project in a folder, its rows in the cache as those of a server are."""

    def __init__(self, folder: str) -> None:
        self._project = featserve.open(folder)
        for first in range(0, ENTITIES, BLOCK):
            self.get(np.arange(first, first + BLOCK))

    def get(self, entities: Any) -> Any:
        return self._project.get(SERVICE, {KEY: entities})

    def values(self, answer: Any) -> Any:
        return answer.values


if __name__ == "__main__":
    serve(lambda: Embedded(sys.argv[1]))
