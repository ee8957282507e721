"""The log of a service, copied into the central one: what Kafka does not have any more, or never had."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import islice
from typing import Final, NamedTuple

from soma_common.collector.observing import observe
from soma_common.collector.storing import store
from soma_common.errors import TransactionConflict
from soma_common.events.append import AppendSettings
from soma_common.events.models import RecordedEvent
from soma_common.events.store import EventStore
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool
from soma_common.retry import Backoff

_PAGE: Final = 500
_MEETING: Final = Backoff(base=0.01, maximum=1.0)
_MOST_TRIES: Final = 20


class Copied(NamedTuple):
    """How far it is: events ``read`` of the service's log, and ``fresh`` ones that the central log did not have."""

    read: int
    fresh: int


async def copy_log(service: Pool, central: Pool) -> AsyncIterator[Copied]:
    """Copy what a service has recorded so far; tells after each page, which is a transaction.

    Broken off, it is begun anew: what is there is passed over. It may run beside the collector.

    Raises:
        DatabaseUnavailable: one of the two is away.
        EventsArchived: the service's retention removed events that were not seen.
    """
    read = fresh = 0
    source = EventStore(service, AppendSettings("collector"))
    async for events, _ in source.so_far(page=_PAGE):
        fresh += await _page(events, central) if events else 0
        read += len(events)
        yield Copied(read, fresh)


async def _page(events: Sequence[RecordedEvent], central: Pool) -> int:
    for delay in islice(_MEETING.delays(), _MOST_TRIES):
        try:
            async with central.transaction(bound=SHORT) as tx:
                fresh = await store(events, tx)
                for event in events:
                    await observe(event, tx)
                return fresh
        except TransactionConflict as error:  # it met the collector
            last = error
        await asyncio.sleep(delay)
    raise last
