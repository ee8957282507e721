"""Examples at the end of the help of commands that do not bring their own."""

from __future__ import annotations

from typing import Final

import click

from soma_common.cli.examples import examples

_EXAMPLES: Final = {
    "db upgrade": ("somastack db upgrade --grant-to shop", "as the owner of the tables, for an application's role"),
    "db status": ("somastack db status && deploy", "go on when nothing is missing"),
    "db repair": ("somastack db repair --yes", "after a restore, without a question"),
    "dlq list": ("somastack dlq list --tenant acme --consumer billing", "one consumer's, the oldest first"),
    "dlq show": ("somastack dlq show LETTER --json", "with its bytes as base64"),
    "dlq retry": ("somastack dlq retry LETTER --why 'price added'", "with all that waits behind it"),
    "dlq retry-all": ("somastack dlq retry-all --all-tenants --consumer billing --dry-run", "how many it would be"),
    "dlq edit": ("somastack dlq edit LETTER --file value.json --why 'typing error'", "another value for its next try"),
    "dlq discard": ("somastack dlq discard LETTER --reason 'a test'", "it is never tried again"),
    "dlq summary": ("somastack dlq summary --all-tenants", "what fails, and how often"),
    "events list": ("somastack events list --tenant acme --type order.placed --json", "a page, for programs"),
    "events show": ("somastack events show EVENT_ID --tenant acme", "all of it"),
    "events tail": ("somastack events tail --all-tenants --follow", "until Ctrl-C"),
    "events replay": (
        "somastack events replay --tenant acme --consumer sales --app shop.app:soma", "what it missed, at once"
    ),
    "events replays": ("somastack events replays --limit 5", "the newest five"),
    "relay": ("somastack relay --name shop --workers 2 --health-port 9000", "as a service, with probes"),
    "retention plan": ("somastack retention plan --policy keep.toml", "what a run would do"),
    "retention run": ("somastack retention run --policy keep.toml --every 3600", "as a service"),
    "retention accept": ("somastack retention accept consumer:billing --why 'it was away'", "it goes on"),
    "retention archives list": ("somastack retention archives list --json", "for programs"),
    "retention archives verify": ("somastack retention archives verify --archive /var/archives", "all of them"),
    "saga skip": ("somastack saga skip SAGA --why 'paid by hand'", "the step counts as done"),
    "saga resolve": ("somastack saga resolve SAGA --happened --why 'the bank says so'", "nobody knew"),
    "saga list": ("somastack saga list --all-tenants --status stuck", "those that wait for a person"),
    "saga inspect": ("somastack saga inspect SAGA --watch", "as it goes on"),
    "saga retry": ("somastack saga retry SAGA --why 'the bank is back'", "a stuck one goes on"),
    "saga compensate": ("somastack saga compensate SAGA --why 'the customer cancelled'", "it turns around"),
    "saga cancel": ("somastack saga cancel SAGA --why 'the customer cancelled'", "before its next step"),
    "saga signal": ("somastack saga signal SAGA approved --json", "what it waits for"),
    "saga graph": ("somastack saga graph place-order --app shop.app:soma", "as a Mermaid flowchart"),
    "saga forget": ("somastack saga forget --ended-before 2026-01-01 --dry-run", "how many it would be"),
    "schemas check": ("somastack schemas check --models shop.events:MODELS --files-only", "without a registry"),
    "schemas write": ("somastack schemas write --models shop.events:MODELS", "into the folder schemas"),
    "schemas push": ("somastack schemas push --models shop.events:MODELS", "files, and registry"),
    "topics status": ("somastack topics status --name shop", "as the relay of shop knows them"),
    "topics accept": ("somastack topics accept soma.shop.events --name shop", "after partitions were added"),
}  # fmt: skip


def illustrate(command: click.Command, path: str) -> None:
    """Give a command, and those below it, their examples."""
    if command.epilog is None and path in _EXAMPLES:
        command.epilog = examples(*_EXAMPLES[path])
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            illustrate(below, f"{path} {name}")
