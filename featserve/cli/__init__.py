"""The command line: the verbs, and how each shows what it did."""

from __future__ import annotations

from featserve.cli import training
from featserve.cli.verbs import main

__all__ = ["main", "training"]
