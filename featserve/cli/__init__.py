"""The command line: the verbs, and how each shows what it did."""

from __future__ import annotations

from featserve.cli import load_test, training
from featserve.cli.verbs import main

__all__ = ["load_test", "main", "training"]
