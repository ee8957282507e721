"""The loop that brings groups to the broker: read, send, await, save, again; the next page is read meanwhile."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

from soma_common.errors import (
    BrokerUnavailable,
    DatabaseUnavailable,
    LeaseLost,
    LogError,
    SomaError,
)
from soma_common.outbox.groups import Batch, Group, divide, later
from soma_common.outbox.parking import Retry
from soma_common.outbox.publishing import (
    POSITION,
    SHARD,
    TIMESTAMP_MS,
    TOPIC,
    Delivery,
    Publisher,
    PublisherFactory,
    Sending,
)
from soma_common.outbox.queue import Outbox
from soma_common.outbox.stats import Condition, Meter
from soma_common.outbox.topics import Topics
from soma_common.postgres.cursor import Cursor, TickReader
from soma_common.postgres.pool import Pool, Row
from soma_common.postgres.shards import Lease, Shards
from soma_common.retry import Backoff

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """How a relay works. Times in seconds.

    Args:
        rows: most rows of one round of a worker at-least-once, over all its groups.
        transaction_rows: most rows of a transaction, per group.
        least_idle, most_idle: the waits between two looks grow from the one to the other while nothing happens.
        save_idle: how often cursors are saved while only other transactions move the ticks.
        maintenance: how often partitions are cleaned and made, and ticks merged.
        stuck: without progress for so long, a relay with work is not live.
        on_parked: called with each row's topic, key, position and reason when it is parked; must return soon.
    """

    rows: int = 20_000
    transaction_rows: int = 10_000
    least_idle: float = 0.002
    most_idle: float = 0.5
    save_idle: float = 1.0
    maintenance: float = 5.0
    stuck: float = 60.0
    backoff: Backoff = field(default_factory=lambda: Backoff(base=0.1, maximum=5.0))
    on_parked: Callable[[str, bytes, int, str], None] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the pumps of one relay share."""

    pool: Pool
    outbox: Outbox
    shards: Shards
    ticks: TickReader
    topics: Topics
    factory: PublisherFactory
    settings: RelaySettings
    meter: Meter
    database: Condition
    broker: Condition


class Pump:
    """Relays some groups over one publisher.

    Without an identity: at least once, cursors are saved in the database after the acknowledgements. With an identity
    (one group then): the cursor is committed with the rows in one broker transaction, and mirrored in the database.
    """

    def __init__(self, parts: Parts, identity: str | None = None) -> None:
        self._p, self.identity = parts, identity
        self.name = identity or "at-least-once"
        self.groups: dict[int, Group] = {}
        self.stopping = False
        self.valid_until = 0.0
        self._arrivals: dict[int, Lease] = {}
        self._leaving: set[int] = set()
        self._wake = asyncio.Event()
        self._publisher: Publisher | None = None
        self._ahead: asyncio.Task[Batch] | None = None
        self._saving: asyncio.Task[None] | None = None
        self._refused: dict[int, str] = {}
        self._portions: dict[int, int] = {}
        self._retry = Retry(parts.outbox)
        self._idle, self._failures, self._saved_at = parts.settings.least_idle, 0, 0.0

    # What the relay tells the pump; takes effect between two rounds.

    def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    def adopt(self, lease: Lease) -> None:
        """A group is ours."""
        self._arrivals[lease.shard] = lease
        self.wake()

    def give_back(self, shard: int) -> None:
        """Release a group once its rows in flight are acknowledged and its cursor is saved."""
        self._leaving.add(shard)
        self.wake()

    def drop(self, shard: int) -> None:
        """Another worker has a group."""
        self._arrivals.pop(shard, None)
        self.groups.pop(shard, None)
        self._leaving.discard(shard)
        self.wake()

    def stop(self) -> None:
        """Finish the rows in flight, save, and end."""
        self.stopping = True
        self.wake()

    # The loop.

    async def run(self) -> None:
        """Until stopped; survives a broker or database that is away."""
        try:
            while not self.stopping:
                await self._guarded(self._turn)
            await self._guarded(self._drain)
        finally:
            await self._close()

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
            return
        except BrokerUnavailable as error:
            self._p.broker.lost(error.message)
        except DatabaseUnavailable as error:
            self._p.database.lost(error.message)
        except LeaseLost as error:
            log.warning("%s: %s", self.name, error.message)
        except LogError as error:
            self._report_lost(error)
        except SomaError as error:
            log.error("%s: %s", self.name, error)
        self._p.meter.errors += 1
        await self._start_over()

    async def _turn(self) -> None:
        await self._change_groups()
        if not self.groups or time.monotonic() >= self.valid_until:
            await self._wait(self._p.settings.most_idle)
            return
        publisher = await self._connected()
        if any(group.blocked for group in self.groups.values()):
            await self._try_parked_again(publisher)
        batch = await self._next_batch()
        if batch.rows or batch.asides:
            self._idle = self._p.settings.least_idle
            await self._relay(publisher, batch)
        else:
            await self._rest(batch)

    async def _drain(self) -> None:
        await self._forget_ahead()
        await self._save_moved()
        await self._saved()

    async def _change_groups(self) -> None:
        """Take up and give back groups while nothing is in flight."""
        if not self._arrivals and not self._leaving:
            return
        await self._forget_ahead()
        await self._saved()
        if self._leaving & self.groups.keys():
            await self._save_moved()
            await self._saved()
        leaving, self._leaving = self._leaving, set()
        for shard in leaving:
            self.groups.pop(shard, None)
        if leaving:
            await self._p.shards.release(frozenset(leaving))
        arrivals, self._arrivals = self._arrivals, {}
        try:
            await self._load({shard: lease.epoch for shard, lease in arrivals.items()})
        except BaseException:
            self._arrivals = arrivals | self._arrivals
            raise

    async def _load(self, epochs: Mapping[int, int]) -> None:
        """The state of groups as the database has it. A publisher's own cursor is compared when it is opened."""
        if not epochs:
            return
        p = self._p
        states = {state.shard: state for state in await p.shards.states()}
        blocked = await p.outbox.blocked(list(epochs))
        settled = (await p.ticks.latest()).tick_id
        p.database.found()
        for shard, epoch in epochs.items():
            if states[shard].epoch == epoch:
                cursor = states[shard].cursor
                self.groups[shard] = Group(shard, epoch, cursor, cursor, blocked[shard], settled)
        if self.identity is not None:
            await self._disconnect()

    async def _connected(self) -> Publisher:
        """The publisher; a new one takes the identity over first, and only then looks where its cursor is."""
        if self._publisher is None:
            self._publisher = await self._p.factory.open(self.identity)
            try:
                if self.identity is not None:
                    await self._take_stored(self._publisher)
            except BaseException:
                await self._disconnect()
                raise
        return self._publisher

    async def _take_stored(self, publisher: Publisher) -> None:
        if not publisher.stored:
            return
        text, _, attempt = publisher.stored.partition(" ")
        stored = Cursor.parse(text)
        for group in self.groups.values():
            if (stored.from_tick, stored.position) > (group.saved.from_tick, group.saved.position):
                await self._p.ticks.next_diff(stored, await self._p.ticks.latest())
            group.saved = group.next = later(group.saved, stored)
            self._p.meter.lost.pop(group.shard, None)
        if attempt:
            await self._p.outbox.attempted(UUID(attempt))
            await self._reload_blocked()

    # Reading.

    async def _next_batch(self) -> Batch:
        ahead, self._ahead = self._ahead, None
        return await (ahead or self._read())

    async def _read(self) -> Batch:
        """The next page of every group, divided into what to send and what to park."""
        p, settings = self._p, self._p.settings
        latest = await p.ticks.latest()
        diffs = {}
        for shard, group in list(self.groups.items()):
            diff = await p.ticks.next_diff(group.next, latest)
            if diff is not None:
                diffs[shard] = diff
        limit = settings.transaction_rows if self.identity else max(1, settings.rows // max(1, len(diffs)))
        pages = await p.outbox.pages(diffs, limit) if diffs else {}
        p.database.found()
        for shard, page in pages.items():
            p.meter.lags[shard] = max(0, latest.position_after - page.diff.low) if page.full else len(page.rows)
        rows = [row for page in pages.values() for row in page.rows]
        refused = await p.topics.check({row[TOPIC] for row in rows}) if rows else {}
        blocked = {shard: self.groups[shard].blocked if shard in self.groups else set() for shard in pages}
        send, asides, fresh = divide(rows, refused, self._refused, blocked)
        for shard, page in pages.items():
            if shard in self.groups:
                self.groups[shard].next = page.end()
        return Batch(pages, send, asides, fresh)

    def _read_ahead(self, batch: Batch) -> None:
        # Not while rows are parked: the keys that this blocks must be known to the next division.
        if not self.stopping and not batch.asides:
            self._ahead = asyncio.create_task(self._read())

    async def _forget_ahead(self) -> None:
        """Read again from what is saved and sent; whatever was read ahead is dropped."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await ahead
            for group in self.groups.values():
                group.next = group.saved

    async def _rest(self, batch: Batch) -> None:
        """Nothing to send: note how far that was, wait a little longer each time."""
        self._p.meter.looked()
        self._p.meter.oldest.pop(self.name, None)
        if time.monotonic() - self._saved_at >= self._p.settings.save_idle:
            await self._save_moved()
        if batch.pages and any(page.full for page in batch.pages.values()):
            return
        await self._wait(self._idle)
        self._idle = min(self._p.settings.most_idle, self._idle * 1.5)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._wake.wait(), timeout=seconds)
            self._idle = self._p.settings.least_idle
        self._wake.clear()

    # Sending.

    async def _relay(self, publisher: Publisher, batch: Batch) -> None:
        if batch.rows:
            oldest = min(page.rows[0][TIMESTAMP_MS] for page in batch.pages.values() if page.rows)
            self._p.meter.oldest[self.name] = oldest / 1000
        self._read_ahead(batch)
        delivery = await publisher.send(Sending(batch.rows, self._p.topics.partitions, self._portions))
        if delivery.unsent:
            await self._partly(batch, delivery)
            return
        if self.identity is not None:
            await self._commit(publisher, batch)
        self._succeeded(len(batch.rows))
        await self._saved()
        self._saving = asyncio.create_task(self._save(batch.ends(), batch))
        if batch.asides:
            await self._saved()

    async def _commit(self, publisher: Publisher, batch: Batch) -> None:
        """Rows and cursor in one broker transaction; rows put aside are in the database before."""
        if batch.asides:
            await self._saved()
            async with self._p.pool.transaction(synchronous=True) as connection:
                lost = await self._p.shards.save({s: g.saved for s, g in self.groups.items()}, connection)
                if lost:
                    raise LeaseLost
                await self._p.outbox.park(connection, batch.asides)
        for end in batch.ends().values():
            await publisher.commit(str(end))

    async def _save(self, cursors: Mapping[int, Cursor], batch: Batch) -> None:
        """Write cursors, and park rows with them; groups that were lost meanwhile are dropped."""
        asides = [aside for aside in batch.asides if aside.shard in self.groups]
        if asides and self.identity is None:
            async with self._p.pool.transaction(synchronous=True) as connection:
                lost = await self._p.shards.save(cursors, connection)
                await self._p.outbox.park(connection, [aside for aside in asides if aside.shard not in lost])
        else:
            lost = await self._p.shards.save(cursors)
        self._p.database.found()
        self._saved_at = time.monotonic()
        for shard in lost:
            self.groups.pop(shard, None)
        for shard, cursor in cursors.items():
            if shard in self.groups:
                self.groups[shard].saved = cursor
        self._after_parking(batch, lost)

    def _after_parking(self, batch: Batch, lost: frozenset[int]) -> None:
        for shard, key in batch.blocked:
            if shard in self.groups:
                self.groups[shard].blocked.add(key)
        parked = [aside for aside in batch.asides if aside.shard not in lost]
        self._p.meter.parked += len(parked)
        for aside in parked:
            self._refused.pop(aside.position, None)
            if aside.reason is not None:
                log.error("Row %d of the outbox is parked, and its key with it: %s", aside.position, aside.reason)
        hook = self._p.settings.on_parked
        if hook is not None and parked:
            by_position = {row[POSITION]: row for page in batch.pages.values() for row in page.rows}
            for aside in parked:
                row = by_position[aside.position]
                hook(row[TOPIC], row[3], aside.position, aside.reason or "follows a parked row of its key")

    async def _partly(self, batch: Batch, delivery: Delivery) -> None:
        """Save what is acknowledged, remember what is to blame, begin anew with another publisher."""
        await self._forget_ahead()
        await self._saved()
        self._note_refused(delivery)
        if self.identity is None:
            ends = batch.acknowledged(delivery.unsent)
            kept = [a for a in batch.asides if a.position <= _reached(batch, delivery, a.shard)]
            blocked = frozenset((a.shard, key) for a in kept for shard, key in batch.blocked if shard == a.shard)
            await self._save(ends, Batch(batch.pages, batch.rows, kept, blocked))
            self._p.meter.sent(len(batch.rows) - len(delivery.unsent))
        await self._disconnect()
        if delivery.error is not None:
            raise delivery.error
        for group in self.groups.values():
            group.next = group.saved

    def _note_refused(self, delivery: Delivery) -> None:
        """A row that was refused alone is parked at the next reading; of several, smaller portions are tried."""
        for rows, reason in delivery.refused:
            if len(rows) == 1:
                self._refused[rows[0][POSITION]] = reason
                self._portions.pop(rows[0][POSITION], None)
            else:
                self._portions.update(dict.fromkeys((row[POSITION] for row in rows), max(1, len(rows) // 16)))
        for topic in {rows[0][TOPIC] for rows, _ in delivery.refused}:
            self._p.topics.forget(topic)

    def _succeeded(self, rows: int) -> None:
        self._p.broker.found()
        self._p.meter.sent(rows)
        self._failures = 0
        self._portions.clear()

    # Parked rows.

    async def _try_parked_again(self, publisher: Publisher) -> None:
        shards = [shard for shard, group in self.groups.items() if group.blocked]
        if not self._retry.due():
            return
        rows = await self._p.outbox.wanted(shards, self._p.settings.transaction_rows)
        if not rows:
            return
        await self._forget_ahead()
        await self._save_moved()
        await self._saved()
        ready = [row for row in rows if self.groups[row[SHARD]].saved.from_tick >= self.groups[row[SHARD]].settled]
        refused = await self._p.topics.check({row[TOPIC] for row in ready})
        for topic in refused:
            await self._p.outbox.refuse_again({row[POSITION]: refused[topic] for row in ready if row[TOPIC] == topic})
        ready = [row for row in ready if row[TOPIC] not in refused]
        if ready:
            await self._send_parked(publisher, ready)
        await self._reload_blocked()

    async def _send_parked(self, publisher: Publisher, rows: Sequence[Row]) -> None:
        attempt = await self._retry.begin(rows) if self.identity is not None else None
        delivery = await publisher.send(Sending(rows, self._p.topics.partitions, self._portions))
        if attempt is not None and not delivery.unsent:
            for group in self.groups.values():
                await publisher.commit(f"{group.saved} {attempt.hex}")
            await self._p.outbox.attempted(attempt)
        elif attempt is None:
            unsent = {row[POSITION] for row in delivery.unsent}
            await self._p.outbox.unparked([row[POSITION] for row in rows if row[POSITION] not in unsent])
        if not delivery.unsent:
            self._succeeded(len(rows))
            self._retry.again()
            return
        self._note_refused(delivery)
        again = {row[POSITION]: self._refused.pop(row[POSITION]) for row in rows if row[POSITION] in self._refused}
        if again:
            await self._p.outbox.refuse_again(again)
        self._retry.again()
        await self._disconnect()
        if delivery.error is not None:
            raise delivery.error

    async def _reload_blocked(self) -> None:
        for shard, keys in (await self._p.outbox.blocked(list(self.groups))).items():
            if shard in self.groups:
                self.groups[shard].blocked = keys

    # Saving and failing.

    async def _save_moved(self) -> None:
        """Save cursors that moved over ticks without rows."""
        await self._saved()
        moved = {shard: group.next for shard, group in self.groups.items() if group.next != group.saved}
        if moved:
            await self._save(moved, Batch())
        self._saved_at = time.monotonic()

    async def _saved(self) -> None:
        """Until the save that is under way is done."""
        saving, self._saving = self._saving, None
        if saving is not None:
            await saving

    async def _disconnect(self) -> None:
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.close()

    def _report_lost(self, error: LogError) -> None:
        for shard in self.groups:
            if self._p.meter.lost.get(shard) != error.message:
                log.error("Group %d of the relay stops: %s", shard, error)
            self._p.meter.lost[shard] = error.message

    async def _start_over(self) -> None:
        """After an error: drop what is in flight, wait, and read the groups' state from the database again."""
        await self._forget_ahead()
        saving, self._saving = self._saving, None
        if saving is not None:
            with suppress(Exception):
                await saving
        await self._disconnect()
        self._failures += 1
        if not self.stopping:
            await self._wait(self._p.settings.backoff.delay(self._failures))
            for shard, group in self.groups.items():
                lease = self._p.shards.owned.get(shard)
                if lease is not None and lease.epoch == group.epoch and shard not in self._leaving:
                    self._arrivals.setdefault(shard, lease)
        self.groups.clear()

    async def _close(self) -> None:
        await self._forget_ahead()
        if self._saving is not None:
            self._saving.cancel()
        await self._disconnect()


def _reached(batch: Batch, delivery: Delivery, shard: int) -> int:
    """Up to which position a group is done, when some of its rows were not sent."""
    unsent = [row[POSITION] for row in delivery.unsent if row[SHARD] == shard]
    return min(unsent) - 1 if unsent else batch.pages[shard].diff.target.position_after
