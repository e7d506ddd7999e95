"""``featserve get --explain``: what the time of one request was spent on, and what made each value.

Comes in: the stages of a request, and the schema of its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.text import Text
from rich.tree import Tree

from featserve.cli.show import show, show_json
from featserve.schema import ServiceSchema
from featserve.stages import Stage


def show_stages(stages: Sequence[Stage], schema: ServiceSchema, took_ns: int, server: str | None) -> None:
    """Print the stages as a tree. ``took_ns``: the whole call. ``server``: who went through them, else this process."""
    width = max(len(s.name) for s in stages) + 4
    within_ns = sum(s.duration_ns for s in stages)
    tree = Tree(_line(f"get {schema.reference}", took_ns, width + 4, "bold"))
    branch = tree.add(_line(f"server {server}" if server else "in this process", within_ns, width))
    made = _made(schema)
    for stage in stages:
        leaf = branch.add(_line(stage.name, stage.duration_ns, width - 4))
        if stage.name in made:
            leaf.add(Text(", ".join(made[stage.name]), "dim"))
    tree.add(_line("network and client" if server else "around it", took_ns - within_ns, width))
    show("", tree)


def show_stages_json(stages: Sequence[Stage], schema: ServiceSchema, took_ns: int) -> None:
    """Print the stages as one JSON object."""
    made = _made(schema)
    told: list[dict[str, Any]] = [
        {"name": s.name, "start_us": s.start_ns / 1_000, "duration_us": s.duration_ns / 1_000}
        | ({"features": made[s.name]} if s.name in made else {})
        for s in stages
    ]
    show_json({"explain": {"service": schema.reference, "duration_us": took_ns / 1_000, "stages": told}})


def _made(schema: ServiceSchema) -> dict[str, list[str]]:
    """Return the features that each stage makes, by the name of the stage."""
    made: dict[str, list[str]] = {}
    for f in schema.features:
        stage = f"transform {f.transform}" if f.view is None else f"codec {schema.views[f.view].id}"
        made.setdefault(stage, []).append(f.name)
    return made


def _line(name: str, duration_ns: int, width: int, style: str = "") -> Text:
    return Text.assemble((f"{name:<{width}}", style), f"{duration_ns / 1_000:>10,.1f} µs")
