"""The demo: a week of flights goes through while its processes are killed; then every row is compared with the file."""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from examples.flights import projection
from examples.flights.chaos import Child, Kill, Killer, Plan, plans
from examples.flights.events import batches
from examples.flights.progress import Progress
from examples.flights.reading import Reading, read_flights
from examples.flights.report import (
    Difference,
    differences,
    show_differences,
    show_letters,
    show_published_again,
    show_reading,
    show_summary,
    show_tables,
)
from examples.flights.servers import clean_environment, servers
from examples.flights.trip import Hotels, Undone, book_trip, fail_on_purpose, show_undone
from examples.flights.truth import Statistics, truth
from examples.flights.worker import RELAY, send_spans
from soma_common import ALL_TENANTS, Event, Soma
from soma_common.deployment import DeployMode
from soma_common.dlq.handler import DLQHandler
from soma_common.dlq.models import Summary
from soma_common.outbox.queue import Outbox
from soma_common.postgres.cursor import TickReader
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards

BATCH = 200
MOST_COUNTED = 20_000
STANDSTILL = 30.0  # seconds without progress after which the rest is given up, and shown as missing

ALL_GOOD, DIFFERENT, SOME_REFUSED = 0, 1, 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the demo shall do."""

    csv: Path
    mode: DeployMode = DeployMode.STANDALONE
    kills: int = 10
    seed: int = 0
    keep: bool = False
    falsify: bool = False
    exactly_once: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of it."""

    reading: Reading
    found: Statistics
    letters: Sequence[Summary]
    wrong: Sequence[Difference]
    rows: int
    kills: Sequence[Kill]
    twice: int
    seconds: float
    trip: Undone | None = None

    @property
    def exit_code(self) -> int:
        """0: all is as in the file; 1: it is not; 3: it is, but rows of the file were refused."""
        if self.wrong or self.twice or self.letters or (self.trip and not self.trip.is_whole):
            return DIFFERENT
        return SOME_REFUSED if self.reading.refused else ALL_GOOD


async def run(options: Options, console: Console) -> int:
    """The whole demo; its exit code.

    Raises:
        UnusableFile: the file holds no flights.
        SomaError: a server cannot be started, or a process failed.
    """
    send_spans("flights-demo")
    reading = read_flights(options.csv)
    show_reading(console, reading)
    folder = _new_folder()
    try:
        outcome = await _through(options, reading, folder, console)
    finally:
        if options.keep:
            console.print(f"kept: {folder}", markup=False, highlight=False, soft_wrap=True)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    _show(console, outcome)
    return outcome.exit_code


def _new_folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="flights-"))
    folder.chmod(0o711)  # the embedded server's own account must pass through
    return folder


async def _through(options: Options, reading: Reading, folder: Path, console: Console) -> Outcome:
    events = [event for batch in batches(reading.flights, BATCH) for event in batch]
    async with AsyncExitStack() as stack:
        progress = stack.enter_context(Progress(console, len(events), options.kills, _kinds(options.mode)))
        settings = await stack.enter_async_context(
            servers(options.mode, folder, lambda what: progress.say(f"starting {what}"))
        )
        env = {**clean_environment(), **settings, "SOMA_EXACTLY_ONCE": str(options.exactly_once).lower()}
        os.environ.clear()
        os.environ.update(env)
        hotels = Hotels()
        soma = await stack.enter_async_context(projection.application(sagas=[book_trip(hotels)]))
        await projection.create_tables(soma.pool)
        run = Run(options, soma, events, progress)
        stack.push_async_callback(run.end)
        outcome = await run.go(reading, folder, env)
        return replace(outcome, trip=await fail_on_purpose(soma, hotels))


async def together(*work: Coroutine[Any, Any, None]) -> None:
    """All of it at once; when one fails the others are ended, and its error is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except* Exception as failed:
        raise first_of(failed) from None


def first_of(failed: BaseExceptionGroup[Any]) -> BaseException:
    """The first error in a group of groups."""
    first = failed.exceptions[0]
    return first_of(first) if isinstance(first, BaseExceptionGroup) else first


def _kinds(mode: DeployMode) -> tuple[str, ...]:
    return ("consumer",) if mode is DeployMode.STANDALONE else ("consumer", "relay")


class Run:
    """One run: publisher, killers and what they know of each other."""

    def __init__(self, options: Options, soma: Soma, events: Sequence[Event], progress: Progress) -> None:
        self._options, self._soma, self._events, self._progress = options, soma, events, progress
        self._published, self._twice = 0, 0
        self._killers: list[Killer] = []
        self._kills: list[Kill] = []
        self._over = asyncio.Event()

    async def go(self, reading: Reading, folder: Path, env: dict[str, str]) -> Outcome:
        """Publish, kill, drain, compare."""
        begun = time.monotonic()
        self._killers = [
            Killer(Child(kind, folder, env), partial(self._outstanding, kind), self._more, self._killed)
            for kind in _kinds(self._options.mode)
        ]
        await together(self._watch(), self._work())
        if (wanted := self._options.kills * len(self._killers)) > len(self._kills):
            self._progress.say(f"{len(self._kills)} of {wanted} kills: the file has no work for more")
        self._progress.say("stopping")
        for killer in self._killers:
            await killer.child.stop()
        if self._options.falsify:
            await projection.falsify(self._soma.pool)
        expected = truth(reading.path, refused=[refused.line for refused in reading.refused])
        found = await projection.tables(self._soma.pool)
        wrong, rows = differences(expected, found), len(expected.rows())
        letters = await DLQHandler(self._soma.pool, who="demo").summary(tenant_id=ALL_TENANTS)
        return Outcome(reading, found, letters, wrong, rows, self._kills, self._twice, time.monotonic() - begun)

    async def _work(self) -> None:
        await together(self._publish(), *[killer.run(self._plans(killer.child.kind)) for killer in self._killers])
        await self._drained()
        await self._publish_again()
        self._over.set()

    async def end(self) -> None:
        """Kill what still runs."""
        for killer in self._killers:
            await killer.child.kill()

    def _plans(self, kind: str) -> Iterator[Plan]:
        share = round(0.75 * len(self._events) / (self._options.kills + 1))
        return plans(kind, self._options.kills, share, self._options.seed)

    def _more(self) -> bool:
        return self._published < len(self._events)

    def _allowed(self) -> int:
        """How many events may be published by now: each kill must find work, the last one too.

        Three quarters of the events are shared out over the kills; the rest, batch by batch, is for kills that came
        too late.
        """
        done = [killer.done for killer in self._killers if not killer.over]
        if not done:
            return len(self._events)
        missed = sum(killer.missed for killer in self._killers)
        share = len(self._events) / (self._options.kills + 1)
        return min(len(self._events), math.ceil(0.75 * share * (min(done) + 1)) + BATCH * missed)

    async def _publish(self) -> None:
        while self._more():
            if self._published >= self._allowed():
                await asyncio.sleep(0.005)
                continue
            await self._soma.publish(self._events[self._published : self._published + BATCH])
            self._published = min(len(self._events), self._published + BATCH)

    async def _publish_again(self) -> None:
        """What a publisher does that crashed and cannot know how far it came: everything again, to no effect."""
        self._progress.say("publishing everything a second time")
        for start in range(0, len(self._events), 1000):
            again = await self._soma.publish(self._events[start : start + 1000])
            self._twice += again.transaction_id is not None

    async def _outstanding(self, kind: str) -> int:
        """What a process that has just been killed left undone, in events."""
        if kind == "relay":
            return await not_relayed(self._soma.pool)
        applied, alerts, crossings = await projection.progress(self._soma.pool)
        return self._published - applied + crossings - alerts

    def _killed(self, kill: Kill) -> None:
        self._kills.append(kill)
        self._progress.killed(kill)

    async def _watch(self) -> None:
        while not self._over.is_set():
            applied, _, _ = await projection.progress(self._soma.pool)
            self._progress.at(self._published, applied)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 0.1)

    async def _drained(self) -> None:
        """Wait until everything that was published has been applied, or nothing moves any more."""
        seen, since = (-1, -1, -1), time.monotonic()
        while True:
            now = await projection.progress(self._soma.pool)
            if now[0] >= len(self._events) and now[1] >= now[2]:
                return
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > STANDSTILL:
                self._progress.say(f"nothing moved for {STANDSTILL:g} s: comparing what is there")
                return
            for killer in self._killers:
                killer.child.check()
            await asyncio.sleep(0.02)


async def not_relayed(pool: Pool) -> int:
    """Rows of the outbox behind the relay's cursors."""
    reader, ticks = f"relay:{RELAY}", TickReader(pool)
    latest = await ticks.latest()
    diffs = {
        state.shard: await ticks.next_diff(state.cursor, latest)
        for state in await Shards(pool, reader, "demo").states()
    }
    behind = {shard: diff for shard, diff in diffs.items() if diff is not None}
    pages = await Outbox(pool, reader).pages(behind, MOST_COUNTED) if behind else {}
    return sum(len(page.rows) for page in pages.values())


def _show(console: Console, outcome: Outcome) -> None:
    show_tables(console, outcome.found, outcome.wrong)
    show_summary(console, outcome.kills, outcome.found.events, len(outcome.found.alerts), outcome.seconds)
    show_published_again(console, outcome.twice)
    show_letters(console, outcome.letters)
    if outcome.trip is not None:
        show_undone(console, outcome.trip)
    show_differences(console, outcome.wrong, outcome.rows)
