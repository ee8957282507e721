"""Second tries of parked rows, by the relay that parked them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from uuid import uuid4

from soma_common.outbox.groups import Group
from soma_common.outbox.publishing import POSITION, SHARD, TOPIC, Delivery, Publisher, Sending
from soma_common.outbox.settings import Parts
from soma_common.postgres.pool import Row

_EVERY = 1.0  # seconds between two looks for rows that somebody wants to try again


class Retries:
    """Sends parked rows that an operator asked for, whole keys, oldest row first.

    In a transaction the try has a name: it is written to the rows first and committed with them, so that a successor
    knows whether they were sent.
    """

    def __init__(self, parts: Parts, groups: dict[int, Group], *, named: bool) -> None:
        self._p, self._groups, self._named = parts, groups, named
        self._next = 0.0

    async def wanted(self) -> list[Row]:
        """Rows to try now. A group's rows are left alone until its cursor has passed all that was parked before."""
        now, blocked = time.monotonic(), [shard for shard, group in self._groups.items() if group.blocked]
        if not blocked or now < self._next:
            return []
        self._next = now + _EVERY
        settled = [shard for shard in blocked if self._groups[shard].saved.from_tick >= self._groups[shard].settled]
        return await self._p.outbox.wanted(settled, self._p.settings.transaction_rows) if settled else []

    async def send(self, publisher: Publisher, rows: Sequence[Row], portions: Mapping[int, int]) -> Delivery:
        """Try rows; those that were sent are parked no more."""
        topics = {row[TOPIC] for row in rows}
        for topic in topics & self._p.topics.refused.keys():
            self._p.topics.forget(topic)  # somebody says that it is fine now
        refused = await self._p.topics.check(topics)
        barred = {row[POSITION]: refused[row[TOPIC]] for row in rows if row[TOPIC] in refused}
        if barred:
            await self._p.outbox.refuse_again(barred)
        ready = [row for row in rows if row[POSITION] not in barred]
        delivery = Delivery()
        if ready:
            sending = Sending(ready, self._p.topics.partitions, portions)
            send = self._send_named if self._named else self._send_plainly
            delivery = await send(publisher, sending)
            self._next = 0.0  # there may be more
        await self.reload()
        return delivery

    async def reload(self) -> None:
        """Which keys are blocked now."""
        for shard, keys in (await self._p.outbox.blocked(list(self._groups))).items():
            if shard in self._groups:
                self._groups[shard].blocked.clear()
                self._groups[shard].blocked.update(keys)

    async def _send_plainly(self, publisher: Publisher, sending: Sending) -> Delivery:
        delivery = await publisher.send(sending)
        unsent = {row[POSITION] for row in delivery.unsent}
        await self._p.outbox.unparked([row[POSITION] for row in sending.rows if row[POSITION] not in unsent])
        return delivery

    async def _send_named(self, publisher: Publisher, sending: Sending) -> Delivery:
        attempt = uuid4()
        await self._p.outbox.attempt([row[POSITION] for row in sending.rows], attempt)
        delivery = await publisher.send(sending)
        if not delivery.unsent:
            saved = self._groups[sending.rows[0][SHARD]].saved
            await publisher.commit(f"{saved} {attempt.hex}")
            await self._p.outbox.attempted(attempt)
        return delivery
