"""The loop that brings groups to the broker: read, send, await, save, again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from uuid import UUID

from soma_common.errors import (
    BrokerUnavailable,
    ConfigurationError,
    CursorLost,
    DatabaseUnavailable,
    LeaseLost,
    LogError,
    SomaError,
)
from soma_common.outbox.groups import Batch, Group, later
from soma_common.outbox.publishing import POSITION, TIMESTAMP_MS, TOPIC, Delivery, Publisher, Sending
from soma_common.outbox.reading import ReadAhead
from soma_common.outbox.retries import Retries
from soma_common.outbox.saving import Saver
from soma_common.outbox.settings import Parts
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.shards import Lease

log = logging.getLogger(__name__)

# A batch that was refused is tried again in portions of this fraction, until single rows are to blame.
_PORTIONS = 16


class Pump:
    """Relays some groups over one publisher.

    Without an identity: at least once, cursors are saved in the database after the acknowledgements. With an identity
    (one group then): the cursor is committed with the rows in one broker transaction, and mirrored in the database.
    """

    def __init__(self, parts: Parts, identity: str | None = None) -> None:
        self._p, self.identity = parts, identity
        self.name = identity or "at-least-once"
        self.groups: dict[int, Group] = {}
        self.valid_until = 0.0
        self._stopping = asyncio.Event()
        self._wake = asyncio.Event()
        self._arrivals: dict[int, Lease] = {}
        self._leaving: set[int] = set()
        self._publisher: Publisher | None = None
        self._refused: dict[int, str] = {}
        self._portions: dict[int, int] = {}
        self._done: dict[int, tuple[int, Cursor]] = {}
        self._ahead = ReadAhead(parts, self.groups, self._refused)
        self._saver = Saver(parts, self.groups)
        self._retries = Retries(parts, self.groups, named=identity is not None)
        self._idle, self._failures = parts.settings.least_idle, 0

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
        self._stopping.set()
        self.wake()

    # The loop.

    async def run(self) -> None:
        """Until stopped; survives a broker or database that is away.

        Raises:
            ConfigurationError: the broker refuses what the settings say.
        """
        try:
            while not self._stopping.is_set():
                await self._guarded(self._turn)
            await self._guarded(self._drain)
        finally:
            self._p.meter.forget(self.name)
            await self._ahead.forget()
            await self._saver.give_up()
            await self._disconnect()

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
            return
        except ConfigurationError:
            raise
        except BrokerUnavailable as error:
            self._p.broker.lost(error.message)
        except DatabaseUnavailable as error:
            self._p.database.lost(error.message)
        except LeaseLost as error:
            log.warning("%s: %s", self.name, error.message)
        except LogError as error:
            self._stop_groups(error)
        except SomaError as error:
            log.error("%s: %s", self.name, error)
        self._p.meter.errors += 1
        await self._start_over()

    async def _turn(self) -> None:
        await self._change_groups()
        if not self.groups or time.monotonic() >= self.valid_until:
            self._p.meter.forget(self.name)
            await self._wait(self._p.settings.most_idle)
            return
        publisher = await self._connected()
        await self._try_parked_again(publisher)
        if self._publisher is not publisher:
            return
        batch = await self._ahead.next(*self._page_size())
        if batch.rows or batch.asides:
            self._idle = self._p.settings.least_idle
            await self._relay(publisher, batch)
        else:
            await self._rest()

    async def _rest(self) -> None:
        """Nothing to send: wait a little longer each time."""
        self._p.meter.looked(self.name)
        if time.monotonic() - self._saver.saved_at >= self._p.settings.save_idle:
            await self._saver.save_moved()
        await self._wait(self._idle)
        self._idle = min(self._p.settings.most_idle, self._idle * 1.5)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
            self._idle = self._p.settings.least_idle
        self._wake.clear()

    async def _drain(self) -> None:
        await self._settle()
        await self._saver.save_moved()

    async def _settle(self) -> None:
        """Nothing is in flight and nothing was read that is not sent."""
        await self._ahead.forget()
        await self._saver.finish()
        for group in self.groups.values():
            group.next = group.saved

    # Groups come and go.

    async def _change_groups(self) -> None:
        if not self._arrivals and not self._leaving:
            return
        await self._settle()
        leaving = frozenset(self._leaving)
        for shard in leaving:
            self.groups.pop(shard, None)
            self._arrivals.pop(shard, None)
        if leaving:
            await self._p.shards.release(leaving)
            self._leaving -= leaving
        arrivals = dict(self._arrivals)
        await self._load({shard: lease.epoch for shard, lease in arrivals.items()})
        for shard, lease in arrivals.items():
            if self._arrivals.get(shard) is lease:
                del self._arrivals[shard]

    async def _load(self, epochs: Mapping[int, int]) -> None:
        """The state of groups as the database has it. A publisher's own cursor is compared when it is opened."""
        if not epochs:
            return
        states = {state.shard: state for state in await self._p.shards.states()}
        blocked = await self._p.outbox.blocked(list(epochs))
        settled = (await self._p.ticks.latest()).tick_id
        self._p.database.found()
        for shard, epoch in epochs.items():
            if (states[shard].owner, states[shard].epoch) == (self._p.shards.worker, epoch):
                cursor = await self._furthest(shard, epoch, states[shard].cursor)
                self.groups[shard] = Group(shard, epoch, cursor, cursor, blocked[shard], settled)
        if self.identity is not None:
            await self._disconnect()

    async def _furthest(self, shard: int, epoch: int, saved: Cursor) -> Cursor:
        """The saved cursor, or what this pump has seen acknowledged since: the save of it may have failed.

        That counts while nobody else owned the group in between: under the same epoch, or the very next one.
        """
        seen_under, done = self._done.get(shard, (epoch, saved))
        if epoch - seen_under > 1 or done == saved:
            return saved
        try:
            await self._p.ticks.next_diff(done, await self._p.ticks.latest())
        except CursorLost:
            return saved  # the database went back to an earlier moment
        furthest = later(saved, done)
        self._done[shard] = epoch, furthest  # ours under this epoch too: the save may fail again before the next one
        return furthest

    def _stop_groups(self, error: LogError) -> None:
        for shard in self.groups:
            if self._p.meter.lost.get(shard) != error.message:
                log.error("Group %d of the relay stops: %s", shard, error)
            self._p.meter.lost[shard] = error.message

    # The publisher.

    async def _connected(self) -> Publisher:
        """The publisher; a new one takes the identity over first, and only then looks where its cursor is."""
        if self._publisher is None:
            self._publisher = await self._p.factory.open(self.identity)
            if self.identity is not None:
                await self._take_stored(self._publisher)
        return self._publisher

    async def _take_stored(self, publisher: Publisher) -> None:
        text, _, attempt = (publisher.stored or "").partition(" ")
        for group in list(self.groups.values()):  # another worker may take one of them while the database is asked
            if text:
                stored = Cursor.parse(text)
                furthest = later(group.saved, stored)
                if furthest == stored:
                    await self._p.ticks.next_diff(stored, await self._p.ticks.latest())
                group.saved = group.next = furthest
            self._p.meter.lost.pop(group.shard, None)
        if attempt:
            await self._p.outbox.attempted(UUID(attempt))
            await self._retries.reload()

    async def _disconnect(self) -> None:
        publisher, self._publisher = self._publisher, None
        if publisher is not None:
            await publisher.close()

    # Sending.

    def _page_size(self) -> tuple[int, bool]:
        settings, alone = self._p.settings, self.identity is not None
        return (settings.transaction_rows if alone else settings.rows), alone

    async def _relay(self, publisher: Publisher, batch: Batch) -> None:
        self._p.meter.oldest[self.name] = min(
            row[TIMESTAMP_MS] for page in batch.pages.values() for row in page.rows[:1]
        )
        if not batch.asides and not self._stopping.is_set():
            self._ahead.begin(*self._page_size())  # not while rows are parked: their keys must be known first
        delivery = await self._send(publisher, batch)
        if delivery.unsent:
            await self._partly(batch, delivery)
            return
        if self.identity is not None:
            await self._commit(publisher, batch)
        self._succeeded(batch)
        await self._saver.begin(batch, park=self.identity is None)
        for aside in batch.asides:
            self._refused.pop(aside.position, None)

    async def _send(self, publisher: Publisher, batch: Batch) -> Delivery:
        slow = self._p.settings.slow
        alarm = asyncio.get_running_loop().call_later(slow, self._p.broker.lost, f"no acknowledgement for {slow:.0f} s")
        try:
            return await publisher.send(Sending(batch.rows, self._p.topics.partitions, self._portions))
        finally:
            alarm.cancel()

    async def _commit(self, publisher: Publisher, batch: Batch) -> None:
        """Rows and cursor in one broker transaction; rows put aside are in the database before."""
        if batch.asides:
            await self._saver.park_first(batch)
        for end in batch.ends().values():
            await publisher.commit(str(end))

    def _succeeded(self, batch: Batch) -> None:
        self._p.broker.found()
        self._p.meter.sent(self.name, len(batch.rows))
        self._failures = 0
        for shard, cursor in batch.ends().items():
            self._done[shard] = (batch.epochs[shard], cursor)
        if self._portions:
            for row in batch.rows:
                self._portions.pop(row[POSITION], None)

    async def _partly(self, batch: Batch, delivery: Delivery) -> None:
        """Save what is acknowledged, remember what is to blame, begin anew with another publisher."""
        await self._settle()
        self._blame(delivery)
        if self.identity is None:
            ends = batch.acknowledged(delivery.unsent)
            asides = [aside for aside in batch.asides if aside.position <= batch.reached(aside.shard, delivery.unsent)]
            self._done |= {shard: (batch.epochs[shard], cursor) for shard, cursor in ends.items()}
            self._p.meter.sent(self.name, len(batch.rows) - len(delivery.unsent))
            await self._saver.save(batch, ends, asides)
        await self._reconnect(delivery)

    async def _reconnect(self, delivery: Delivery) -> None:
        await self._disconnect()
        if delivery.error is not None:
            raise delivery.error
        for group in self.groups.values():
            group.next = group.saved

    def _blame(self, delivery: Delivery) -> None:
        """A row that was refused alone is parked at the next reading; of several, smaller portions are tried."""
        for rows, reason in delivery.refused:
            if len(rows) == 1:
                self._refused[rows[0][POSITION]] = reason
                self._portions.pop(rows[0][POSITION], None)
            else:
                self._portions.update(dict.fromkeys((row[POSITION] for row in rows), max(1, len(rows) // _PORTIONS)))
        for topic in {row[TOPIC] for row in delivery.unsent}:
            self._p.topics.forget(topic)

    async def _try_parked_again(self, publisher: Publisher) -> None:
        if not any(group.blocked for group in self.groups.values()):
            return
        rows = await self._retries.wanted()
        if not rows:
            return
        await self._settle()
        delivery = await self._retries.send(publisher, rows, self._portions)
        if not delivery.unsent:
            self._p.meter.sent(self.name, len(rows))
            return
        self._blame(delivery)
        again = {row[POSITION]: self._refused.pop(row[POSITION]) for row in rows if row[POSITION] in self._refused}
        if again:
            await self._p.outbox.refuse_again(again)
        await self._reconnect(delivery)

    async def _start_over(self) -> None:
        """After an error: drop what is in flight, wait, and read the groups' state from the database again."""
        await self._ahead.forget()
        await self._saver.give_up()
        await self._disconnect()
        epochs = {shard: group.epoch for shard, group in self.groups.items()}
        self._failures += 1
        with suppress(TimeoutError):
            async with asyncio.timeout(self._p.settings.backoff.delay(self._failures)):
                await self._stopping.wait()
        for shard, epoch in epochs.items():
            lease = self._p.shards.owned.get(shard)
            if lease is not None and lease.epoch == epoch:
                self._arrivals.setdefault(shard, lease)
        self.groups.clear()
