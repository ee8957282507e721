"""The ``somastack`` command. Sub-commands are loaded when they are called, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from soma_common import __version__
from soma_common.cli.telling import complain
from soma_common.errors import SomaError

# Name -> (module, attribute, one line of help).
_COMMANDS = {
    "collect": ("soma_common.cli.collect", "collect", "Keep a central log of all services until SIGTERM."),
    "console": ("soma_common.cli.console", "console", "The web console, until Ctrl-C."),
    "db": ("soma_common.cli.db", "db", "The database: upgrade, status, repair."),
    "dlq": ("soma_common.cli.dlq", "dlq", "Dead letters: list, show, retry, retry-all, edit, discard, summary."),
    "events": ("soma_common.cli.events", "events", "Recorded events: list, show, tail, replay, replays."),
    "relay": ("soma_common.cli.relay", "relay", "Bring events from the outbox to Kafka until SIGTERM."),
    "retention": (
        "soma_common.cli.retention",
        "retention",
        "What is kept for how long: plan, run, accept, archives.",
    ),
    "saga": (
        "soma_common.cli.saga",
        "saga",
        "Sagas: list, inspect, retry, skip, resolve, compensate, cancel, signal, forget, graph.",
    ),
    "topics": ("soma_common.cli.topics", "topics", "Topics of the relay: status, accept."),
    "schemas": ("soma_common.cli.schemas", "schemas", "Avro schemas: check, write and push."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without loading anything."""
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load one command."""
        if cmd_name not in _COMMANDS:
            return None
        module, attribute, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in ``--help``."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in sorted(_COMMANDS.items())])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="somastack")
def somastack() -> None:
    """Durable events on PostgreSQL and Kafka.

    Settings come from the environment (SOMA_DEPLOY_MODE, SOMASTACK_POSTGRES_DSN, …).
    """


def main(args: Sequence[str] | None = None) -> Any:
    """Run the command; an error of the library is one line on stderr and exit code 1."""
    try:
        return somastack(args=args, prog_name="somastack")
    except SomaError as error:
        complain(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
