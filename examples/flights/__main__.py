"""The command: ``python -m examples.flights demo`` and its parts."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from examples.flights.reading import Reading, UnusableFile, read_flights
from soma_common.errors import ConfigurationError, SomaError

WEEK = Path(__file__).parents[1] / "data" / "flights-2013-02-04.csv"
UNUSABLE = 2

csv_option = click.option(
    "--csv", type=click.Path(path_type=Path), default=WEEK, help="A CSV with the columns of nycflights13.",
)  # fmt: skip


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def flights() -> None:
    """A week of flights out of New York as events.

    Exit codes: 0 all is well, 1 the tables differ from the file or something failed, 2 the file or a setting cannot be
    used, 3 all is well but rows of the file were refused.
    """


@flights.command()
@csv_option
@click.option("--mode", default="standalone", help="standalone (embedded PostgreSQL) or somastack (with Kafka).")
@click.option("--kills", default=10, type=click.IntRange(0, 100), help="SIGKILLs per kind of process.")
@click.option("--seed", default=0, help="The same seed gives the same plan of kills.")
@click.option("--exactly-once", is_flag=True, help="The relay works in Kafka transactions (somastack).")
@click.option("--keep", is_flag=True, help="Keep the folder with database and logs.")
@click.option("--falsify", is_flag=True, help="Spoil one row before the comparison, which must notice.")
def demo(mode: str, **options: Any) -> None:
    """Publish the week, kill the processes on the way, compare every row with the file."""
    from examples.flights.demo import Options, run
    from soma_common.deployment import parse_mode

    sys.exit(interruptible(run(Options(mode=parse_mode(mode), **options), Console())))


@flights.command()
@csv_option
def check(csv: Path) -> None:
    """Read a file and tell which rows would be refused."""
    sys.exit(code_of(shown(csv)))


@flights.command()
@csv_option
def publish(csv: Path) -> None:
    """Publish a file to where the environment points (SOMA_DEPLOY_MODE, …); again is harmless."""
    reading = shown(csv)

    async def work() -> int:
        from examples.flights.events import batches
        from examples.flights.projection import application

        async with application() as soma:
            for batch in batches(reading.flights, 200):
                await soma.publish(batch)
        return code_of(reading)

    sys.exit(interruptible(work()))


@flights.command()
def work() -> None:
    """Run the consumers where the environment points, until SIGTERM."""
    from examples.flights.projection import work

    asyncio.run(work())


@flights.command()
@csv_option
def report(csv: Path) -> None:
    """Compare the tables where the environment points with a file."""
    reading = shown(csv)

    async def work() -> int:
        from examples.flights import projection
        from examples.flights.report import differences, show_differences, show_tables
        from examples.flights.truth import truth

        async with projection.application() as soma:
            await projection.create_tables(soma.pool)
            found = await projection.tables(soma.pool)
        expected = truth(csv, refused=[refused.line for refused in reading.refused])
        wrong = differences(expected, found)
        show_tables(Console(), found, wrong)
        show_differences(Console(), wrong, len(expected.rows()))
        return 1 if wrong else code_of(reading)

    sys.exit(interruptible(work()))


def shown(csv: Path) -> Reading:
    """The flights of a file; tells what was refused."""
    from examples.flights.report import show_reading

    reading = read_flights(csv)
    show_reading(Console(), reading)
    return reading


def code_of(reading: Reading) -> int:
    """The exit code when all else is well."""
    return 3 if reading.refused else 0


def interruptible(work: Coroutine[Any, Any, int]) -> int:
    """Run to the end, or until SIGINT or SIGTERM; what was begun is ended either way."""
    caught: list[signal.Signals] = []

    async def main() -> int:
        task = asyncio.ensure_future(work)

        def stop(number: signal.Signals) -> None:
            if not caught:
                task.cancel()
            caught.append(number)

        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop, number)
        with suppress(asyncio.CancelledError):
            return await task
        return 128 + caught[0] if caught else 1

    return asyncio.run(main())


def told(error: SomaError) -> None:
    """One line with the cause, one with the cure."""
    click.secho(f"Error: {error.message}", fg="red", err=True)
    if error.cure:
        click.echo(f"Cure:  {error.cure}", err=True)


def main() -> None:
    """Run the command; errors of the library become two lines and an exit code."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells every attempt, the library each change
    try:
        flights(prog_name="python -m examples.flights")
    except SomaError as error:
        told(error)
        sys.exit(UNUSABLE if isinstance(error, UnusableFile | ConfigurationError) else 1)


if __name__ == "__main__":
    main()
