"""The ``somastack`` command. Sub-commands are loaded when they are called, so that help answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click
from click.shell_completion import CompletionItem

from soma_common import __version__
from soma_common.cli.illustrations import illustrate
from soma_common.cli.telling import complain
from soma_common.errors import SomaError

# Name -> (module, attribute, one line of help).
_COMMANDS = {
    "collect": ("soma_common.cli.collect", "collect", "Keep a central log of all services until SIGTERM."),
    "completion": ("soma_common.cli.completion", "completion", "The completion script of a shell."),
    "console": ("soma_common.cli.console", "console", "The web console, until Ctrl-C."),
    "db": ("soma_common.cli.db", "db", "The database: upgrade, status, repair."),
    "dlq": ("soma_common.cli.dlq", "dlq", "Dead letters: list, show, retry, retry-all, edit, discard, summary."),
    "doctor": ("soma_common.cli.doctor", "doctor", "What is wrong here, and what to do about it."),
    "down": ("soma_common.cli.down", "down", "End what `up` started."),
    "events": ("soma_common.cli.events", "events", "Recorded events: list, show, tail, replay, replays."),
    "logs": ("soma_common.cli.logs", "logs", "What the servers of `up` say."),
    "new": ("soma_common.cli.new", "new", "A starter project that runs and passes its tests."),
    "relay": ("soma_common.cli.relay", "relay", "Bring events from the outbox to Kafka until SIGTERM."),
    "replay": ("soma_common.cli.replay", "replay", "Replays: plan, start, run, pause, resume, cancel, list."),
    "retention": ("soma_common.cli.retention", "retention", "What is kept for how long: plan, run, accept, archives."),
    "saga": (
        "soma_common.cli.saga",
        "saga",
        "Sagas: list, inspect, retry, skip, resolve, compensate and more.",
    ),
    "schemas": ("soma_common.cli.schemas", "schemas", "Avro schemas: check, write and push."),
    "status": ("soma_common.cli.status", "status", "Every component, and whether it is well."),
    "topics": ("soma_common.cli.topics", "topics", "Topics of the relay: status, accept."),
    "up": ("soma_common.cli.up", "up", "Start the servers of a mode, and leave them running."),
    "worker": ("soma_common.cli.worker", "worker", "Run the consumers, sagas and relay of an application."),
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
        illustrate(command, cmd_name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names and their lines of help, without loading anything; the options of this group."""
        names = [CompletionItem(name, help=text) for name, (_, _, text) in sorted(_COMMANDS.items())]
        return [item for item in names if item.value.startswith(incomplete)] + click.Command.shell_complete(
            self, ctx, incomplete
        )

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
