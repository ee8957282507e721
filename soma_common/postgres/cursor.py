"""The snapshot-diff cursor: reads a log in order without missing a late commit and without waiting for long writers.

A batch is what one tick (a durable snapshot) shows and the one before it does not, ordered by position. The rules are
those of PgQ and of docs/explanation/reading-in-order.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from soma_common.errors import CursorLost
from soma_common.postgres.pool import Pool, Row
from soma_common.sql.loader import blocks


@dataclass(frozen=True, slots=True)
class Tick:
    """A snapshot that committed durably before anything was read by it.

    Rows of transactions at or above ``xmax`` lie above ``position_before``; all visible rows at or below
    ``position_after``. ``era_start`` is the last position before the tick's era: transaction ids of older rows belong
    to another cluster and mean nothing here.
    """

    tick_id: int
    token: int
    snapshot: str
    position_before: int
    position_after: int
    era: int
    era_start: int = 0

    @property
    def xmax(self) -> str:
        """The first transaction id that had not been handed out or had not ended (as text: xid8 is unsigned)."""
        return self.snapshot.split(":")[1]

    @property
    def running(self) -> frozenset[str]:
        """The transactions below ``xmax`` that were still running."""
        listed = self.snapshot.split(":")[2]
        return frozenset(listed.split(",")) if listed else frozenset()


class Cursor(NamedTuple):
    """A place in the log: all that ``from_tick`` shows is done, and of what ``to_tick`` adds, all up to ``position``.

    The tokens tell whether the ticks are still those of this database's history. A named tuple, since there is one per
    event that is read.
    """

    from_tick: int = 0
    from_token: int = 0
    to_tick: int | None = None
    to_token: int | None = None
    position: int = 0

    def __str__(self) -> str:
        target = f"{self.to_tick}.{self.to_token}" if self.to_tick is not None else "-"
        return f"{self.from_tick}.{self.from_token}/{target}/{self.position}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor that ``str`` wrote.

        Raises:
            CursorLost: the text is something else.
        """
        try:
            start, target, position = text.split("/")
            from_tick, from_token = map(int, start.split("."))
            to_tick, to_token = (None, None) if target == "-" else map(int, target.split("."))
            return cls(from_tick, from_token, to_tick, to_token, int(position))
        except ValueError as error:
            raise CursorLost(f"{text!r:.100} is not a cursor.") from error


BEGINNING = Cursor()


@dataclass(frozen=True, slots=True)
class Diff:
    """What to read next: the rows that ``target`` adds to ``base``, above ``position``."""

    base: Tick
    target: Tick
    position: int

    @property
    def low(self) -> int:
        """Rows of transactions that began after ``base`` lie above this position."""
        return max(self.base.position_before, self.position)

    @property
    def stragglers(self) -> list[str]:
        """Transactions that were running at ``base`` and have ended by ``target``: their positions may be low."""
        return sorted(self.base.running - self.target.running, key=int)

    def after(self, position: int) -> Cursor:
        """The cursor once every row up to ``position`` is done, with more of this diff to come."""
        return Cursor(self.base.tick_id, self.base.token, self.target.tick_id, self.target.token, position)

    def done(self) -> Cursor:
        """The cursor once this diff is done as a whole."""
        return Cursor(self.target.tick_id, self.target.token)


class PageSource(Protocol):
    """Fetches the rows of a diff from a table, ordered by position (the first column), at most ``limit``."""

    async def page(self, connection: Any, diff: Diff, limit: int) -> Sequence[Row]:
        """The rows."""


def merge(limit: int, *pages: Sequence[Row]) -> Sequence[Row]:
    """Several pages of one diff, each ordered by position, as one."""
    filled = [page for page in pages if page]
    if len(filled) <= 1:
        return filled[0] if filled else []
    return sorted((row for page in filled for row in page), key=lambda row: row[0])[:limit]


class TickReader:
    """Finds the next diff of a cursor. Shared by all readers of one process.

    Ticks are cached: within one history they never change. Each look at the newest tick also asks whether the newest
    one seen before is still there; after a failover or a restore under a running process it may not be.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._known: dict[int, Tick] = {}
        self._newest = (0, 0)

    async def latest(self) -> Tick:
        """The newest tick, made now when something changed; it has committed durably when this returns."""
        *columns, same_history = (await self._pool.fetch(_sql("tick"), *self._newest))[0]
        tick = Tick(*columns)
        if not same_history:
            self._known.clear()
        if not same_history or tick.tick_id > self._newest[0]:
            self._newest = tick.tick_id, tick.token
        self._remember(tick)
        return tick

    async def next_diff(self, cursor: Cursor, latest: Tick) -> Diff | None:
        """What this cursor has to read to reach ``latest``; None when there is nothing.

        Raises:
            CursorLost: the cursor's tick is not part of this database's history.
        """
        base = await self.at(cursor.from_tick, cursor.from_token)
        if cursor.to_tick is not None and cursor.to_token is not None:
            target = await self.at(cursor.to_tick, cursor.to_token)
            return Diff(base, target, max(cursor.position, base.era_start))
        if base.tick_id >= latest.tick_id:
            return None
        if base.era == latest.era:
            return Diff(base, latest, base.era_start)
        closing = await self._one(_sql("last_of_era"), base.era)
        if closing.tick_id > base.tick_id:
            return Diff(base, closing, base.era_start)
        # Nothing lies between the end of an era and the beginning of the next: go over.
        opening = await self._one(_sql("first_of_era"), base.era + 1)
        return await self.next_diff(Cursor(opening.tick_id, opening.token), latest)

    async def at(self, tick_id: int, token: int) -> Tick:
        """A tick that was seen before.

        Raises:
            CursorLost: it is not part of this database's history.
        """
        known = self._known.get(tick_id)
        if known is None:
            known = await self._one(_sql("tick_by_id"), tick_id)
            self._remember(known)
        if known.token != token:
            raise CursorLost(
                f"Tick {tick_id} is another one in this database: it was promoted or restored to an earlier moment."
            )
        return known

    async def _one(self, sql: str, value: int) -> Tick:
        rows = await self._pool.fetch(sql, value)
        if not rows:
            raise CursorLost(f"Tick {value} is not in this database: it was restored to an earlier moment, or merged.")
        return Tick(*rows[0])

    def _remember(self, tick: Tick) -> None:
        self._known[tick.tick_id] = tick
        if len(self._known) > 4096:
            for old in sorted(self._known)[:2048]:
                del self._known[old]


def _sql(name: str) -> str:
    return blocks("readers")[name]
