"""``somastack doctor``: what is wrong here, and what to do about it."""

from __future__ import annotations

import asyncio
import os
import sys

import click

from soma_common.cli.checks.findings import Area, Limits, Subject, exit_code
from soma_common.cli.checks.output import show, show_json
from soma_common.cli.checks.running import examine
from soma_common.cli.examples import examples
from soma_common.cli.stack.places import effective


@click.command(epilog=examples(
    "somastack doctor", "everything that the environment names",
    "somastack doctor --only database --only work --quiet", "parts of it, and of these what is to be done",
    "somastack doctor --json | jq '.findings[] | select(.level == \"fail\")'", "for programs",
))  # fmt: skip
@click.option("--only", "areas", multiple=True, type=click.Choice([area.value for area in Area]), help="Repeat it.")
@click.option("--quiet", is_flag=True, help="Only what is to be looked at.")
@click.option("--within", default=5.0, show_default=True, type=click.FloatRange(0.1, 300),
              help="Seconds for one question to a server.")  # fmt: skip
@click.option("--old", default=300.0, show_default=True, type=click.FloatRange(0, 86_400),
              help="Seconds after which a transaction, or an event on its way, is old.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
def doctor(*, areas: tuple[str, ...], quiet: bool, within: float, old: float, as_json: bool) -> None:
    """Look at settings, machine, database, Kafka, registry and work, and say what to do.

    Nothing is changed, nothing is started. Without settings of your own it looks at what `somastack up` started.

    Exit codes: 0 all is well, 1 something is to be looked at, 2 something failed.
    """
    subject = Subject(effective(os.environ), Limits(old=old, within=within))
    found = asyncio.run(examine(subject, [Area(area) for area in areas] or list(Area)))
    code = exit_code([finding for findings in found.values() for finding in findings])
    if as_json:
        show_json(found, code)
    else:
        show(found, quiet=quiet)
    sys.exit(code)
