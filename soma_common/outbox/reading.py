"""Reads the next rows of groups, and the ones after them while the first are on their way."""

from __future__ import annotations

from collections.abc import Mapping

from soma_common.ahead import Ahead
from soma_common.outbox.groups import Batch, Group, divide
from soma_common.outbox.publishing import TOPIC
from soma_common.outbox.settings import Parts


class ReadAhead:
    """The batches of some groups, in order. Reading moves ``Group.next``."""

    def __init__(self, parts: Parts, groups: dict[int, Group], refused_rows: Mapping[int, str]) -> None:
        self._p, self._groups, self._refused_rows = parts, groups, refused_rows
        self._ahead: Ahead[Batch] = Ahead()

    async def next(self, rows: int, per_group: bool) -> Batch:
        """The next batch: the one that is being read already, or a new one."""
        return await (self._ahead.take() if self._ahead else self._read(rows, per_group))

    def begin(self, rows: int, per_group: bool) -> None:
        """Read the batch after the last one now."""
        self._ahead.begin(self._read(rows, per_group))

    async def forget(self) -> None:
        """Drop what was read ahead. The caller sets ``Group.next`` back."""
        await self._ahead.forget()

    async def _read(self, rows: int, per_group: bool) -> Batch:
        parts, groups = self._p, dict(self._groups)
        latest = await parts.ticks.latest()
        found = {shard: await parts.ticks.next_diff(group.next, latest) for shard, group in groups.items()}
        diffs = {shard: diff for shard, diff in found.items() if diff is not None}
        limit = rows if per_group else max(1, rows // max(1, len(diffs)))
        pages = await parts.outbox.pages(diffs, limit) if diffs else {}
        parts.database.found()
        for shard in groups:
            page = pages.get(shard)
            behind = latest.position_after - page.rows[-1][0] if page is not None and page.full else 0
            parts.meter.lags[shard] = behind + (len(page.rows) if page is not None else 0)
        every = [row for page in pages.values() for row in page.rows]
        refused = await parts.topics.check({row[TOPIC] for row in every}) if every else {}
        blocked = {shard: groups[shard].blocked for shard in pages}
        send, asides = divide(every, refused, self._refused_rows, blocked)
        for shard, page in pages.items():
            groups[shard].next = page.end()
        return Batch(pages, send, asides, {shard: groups[shard].epoch for shard in pages})
