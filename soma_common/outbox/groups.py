"""A group of keys on its way to the broker: where it stands, and which of its rows are put aside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from soma_common.outbox.publishing import KEY, POSITION, SHARD, TOPIC
from soma_common.outbox.queue import Aside, BlockedKey, Page
from soma_common.postgres.cursor import Cursor
from soma_common.postgres.pool import Row

GROUPS = 8
"""Groups of a relay: the column ``shard`` of the outbox is the key's hash modulo this."""


@dataclass(slots=True)
class Group:
    """A group that this worker owns under an epoch.

    ``saved`` is where a successor would go on; ``next`` is where this worker reads on. Keys in ``blocked`` have parked
    rows. Parked rows are tried again only once ``saved`` has reached tick ``settled``: then every row that a former
    owner parked lies behind the cursor and cannot be met again.
    """

    shard: int
    epoch: int
    saved: Cursor
    next: Cursor
    blocked: set[BlockedKey] = field(default_factory=set)
    settled: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    """What one round brings: a page per group, divided into rows to send and rows to put aside."""

    pages: Mapping[int, Page] = field(default_factory=dict)
    rows: Sequence[Row] = ()
    asides: Sequence[Aside] = ()
    epochs: Mapping[int, int] = field(default_factory=dict)

    def ends(self) -> dict[int, Cursor]:
        """The cursors once all of it is done."""
        return {shard: page.end() for shard, page in self.pages.items()}

    def acknowledged(self, unsent: Sequence[Row]) -> dict[int, Cursor]:
        """The cursors when everything but ``unsent`` is done: each stops before its first unsent row."""
        first: dict[int, int] = {}
        for row in unsent:
            first[row[SHARD]] = min(row[POSITION], first.get(row[SHARD], row[POSITION]))
        return {
            shard: page.before(first[shard]) if shard in first else page.end() for shard, page in self.pages.items()
        }

    def reached(self, shard: int, unsent: Sequence[Row]) -> int:
        """Up to which position a group is done when everything but ``unsent`` is."""
        first = [row[POSITION] for row in unsent if row[SHARD] == shard]
        return int(min(first) - 1 if first else self.pages[shard].rows[-1][POSITION])


def divide(
    rows: Sequence[Row],
    refused_topics: Mapping[str, str],
    refused_rows: Mapping[int, str],
    blocked: Mapping[int, set[BlockedKey]],
) -> tuple[Sequence[Row], list[Aside]]:
    """The rows to send, and those to park.

    A row is parked for its topic, for itself, or because an earlier row of its key is.
    """
    if not refused_topics and not refused_rows and not any(blocked.values()):
        return rows, []
    send: list[Row] = []
    asides: list[Aside] = []
    fresh: set[tuple[int, BlockedKey]] = set()
    for row in rows:
        shard, key = row[SHARD], (row[TOPIC], row[KEY])
        reason = refused_rows.get(row[POSITION]) or refused_topics.get(row[TOPIC])
        if reason is None and key not in blocked[shard] and (shard, key) not in fresh:
            send.append(row)
        else:
            asides.append(Aside(shard, row[POSITION], reason))
            fresh.add((shard, key))
    return send, asides


def later(mirror: Cursor, stored: Cursor) -> Cursor:
    """The one that is further. Both belong to one chain of owners, so they differ in how far they are only."""
    return max(mirror, stored, key=lambda c: (c.from_tick, c.to_tick is not None, c.position))
