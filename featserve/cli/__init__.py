"""The command line: the verbs, each of which is loaded when it is run, and what becomes of its errors.

Errors of the library are one message on standard error and exit code 1; a wrong command line is 2, Ctrl-C 130.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

import featserve
from featserve.errors import FeatserveError

VERBS = {
    "init": ("verbs", "init", "Make a small, commented project that works at once."),
    "plan": ("verbs", "plan", "Show what apply would change."),
    "apply": ("verbs", "apply", "Publish the project's definitions."),
    "materialize": ("verbs", "materialize", "Load views from their sources into the store."),
    "push": ("verbs", "push", "Count the events of a file in the windows of views."),
    "serve": ("verbs", "serve", "Serve the features until Ctrl-C or SIGTERM."),
    "get": ("verbs", "get", "Get features, and why each is what it is."),
    "describe": ("verbs", "describe", "Describe a service, view or entity."),
    "list": ("verbs", "list_", "List what was applied."),
    "status": ("verbs", "status", "Show what was loaded when, and who holds the store."),
    "history": ("verbs", "history", "Show what was applied when, and by whom."),
    "load-test": ("load_test", "load_test", "Measure how fast a running server answers."),
    "train": ("training", "train", "Write a training frame for a file of labels."),
    "leakage": ("training", "leakage", "Show what careless joins would do to a training set."),
}
"""In the order of their use: the module and the function of each verb, and what it does."""


class Verbs(click.Group):
    """A group that loads only the verb that is run, and whose errors are messages, not tracebacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module, function, _ = VERBS[cmd_name]
        verb: click.Command = getattr(importlib.import_module(f"featserve.cli.{module}"), function)
        return verb

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, what) for name, (_, _, what) in VERBS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except FeatserveError as error:
            importlib.import_module("featserve.cli.show").show_error(error)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(130)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(featserve.__version__, prog_name="featserve", message="%(prog)s %(version)s")
def main() -> None:
    """Define features, load them, and serve them to models over gRPC.

    Start with `featserve init FOLDER`: it makes a small project that works, and says what to try.
    """
