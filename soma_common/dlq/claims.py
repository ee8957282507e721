"""The claim of a batch: which events are new, and which of those must wait behind open letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from soma_common.events.models import RecordedEvent
from soma_common.postgres.pool import fetch
from soma_common.sql.loader import blocks

_Key = tuple[Any, str, str]


@dataclass(frozen=True, slots=True)
class Claim:
    """For each event of the call: whether it is new, and whether it is new but its sequence has open letters."""

    fresh: tuple[bool, ...]
    blocked: tuple[bool, ...]


async def claim(
    tx: Any,
    consumer_id: int,
    events: Sequence[RecordedEvent],
    sequences: Sequence[bytes],
    *,
    idle_timeout: float = 30.0,
) -> Claim:
    """Enter events into the inbox in the transaction ``tx``, and look for open letters afterwards (decision 0007).

    The second of two equal events of one call is not new. Also makes the commit wait for the disk, and lets PostgreSQL
    end the transaction when the client is silent for ``idle_timeout`` seconds.

    Args:
        sequences: of each event, what it stays in order with (``sequence_of``).
    """
    ids: dict[_Key, int] = {}
    keys: dict[_Key, int] = {}
    for place, event in enumerate(events):
        if known_by_id(event):
            ids.setdefault((event.event_id, event.tenant_id, event.service_id), place)
        else:
            keys.setdefault((event.idempotency_key, event.tenant_id, event.service_id), place)
    places = [*ids.values(), *keys.values()]
    columns = [*_columns(ids), *_columns(keys), [sequences[place] for place in places]]
    args = (consumer_id, f"{int(idle_timeout * 1000)}ms", *columns)
    fresh, blocked = (await fetch(tx, blocks("dead_letters")["claim"], args))[0]
    new = set(places) if fresh is None else {places[number - 1] for number in fresh}
    waits = {places[number - 1] for number in blocked or ()}
    every = range(len(events))
    return Claim(tuple(place in new for place in every), tuple(place in waits for place in every))


def known_by_id(event: RecordedEvent) -> bool:
    """Whether the inbox knows the event by its UUIDv7, not by a key that a caller gave."""
    return event.event_id.version == 7 and event.idempotency_key == str(event.event_id)


def _columns(wanted: dict[_Key, int]) -> list[list[Any]]:
    return [list(column) for column in zip(*wanted, strict=True)] if wanted else [[], [], []]
