"""The rows of retention: which archives there are and how far each is, under a lease that one run holds."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID, uuid4

from soma_common.errors import ConfigurationError, LeaseLost, RetentionError, ValidationError
from soma_common.events.rows import SELECT
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, Row, fetch
from soma_common.retention.manifest import Manifest
from soma_common.sql.loader import blocks

_MOST_TEXT: Final = 1000  # characters of who and why


class ArchiveState(StrEnum):
    """How far an archive is. Events leave the log from ``REMOVING`` on."""

    EXPORTING = "exporting"
    VERIFIED = "verified"
    REMOVING = "removing"
    REMOVED = "removed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A partition of the log that nobody writes to any more, but for transactions that still run.

    ``size`` is in bytes, indexes included; ``tick_id`` is None while there are such transactions; ``behind`` are the
    readers that have not passed it.
    """

    name: str
    lower_position: int
    upper_position: int
    size: int
    tick_id: int | None
    behind: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Archive:
    """An archive as the database knows it. What its manifest tells is None until it is verified."""

    archive_id: UUID
    lower_position: int
    upper_position: int
    event_types: tuple[str, ...]
    whole: bool
    state: ArchiveState
    location: str
    tick_id: int
    events: int | None
    size: int | None
    first_position: int | None
    last_position: int | None
    manifest_sha256: str | None
    made_by: str
    started_at: datetime
    verified_at: datetime | None
    removed_at: datetime | None
    forced_by: str | None
    forced_why: str | None
    overtaken: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Force:
    """Who takes it upon himself that readers are overtaken, and why.

    Raises:
        ValidationError: one of them is empty or no line of text.
    """

    by: str
    why: str

    def __post_init__(self) -> None:
        line("who", self.by)
        line("why", self.why)


def line(name: str, text: str) -> str:
    """The text, if it is one line that says something.

    Raises:
        ValidationError: it is not.
    """
    if not isinstance(text, str) or not text.strip() or len(text) > _MOST_TEXT or not text.isprintable():
        raise ValidationError(
            f"{name} is {text!r:.80}.", cure=f"say {name} in one line of up to {_MOST_TEXT} characters."
        )
    return text


class Catalog:
    """The archives of a database. What changes them needs the lease: see :meth:`claim`.

    ``lease``: seconds after which another run may go on where a silent one was.
    """

    def __init__(self, pool: Pool, *, who: str, lease: float = 30.0) -> None:
        self.pool, self.who, self.lease = pool, line("who", who), timedelta(seconds=lease)
        self.owner = uuid4()

    async def check_rights(self) -> None:
        """Raise ConfigurationError unless this role owns the tables."""
        if not (await self.pool.fetch(_sql("owns")))[0][0]:
            raise ConfigurationError(
                "Only the role that owns the tables of soma may remove events.",
                cure="name it in SOMASTACK_POSTGRES_DSN: docs/how-to/migrations-and-roles.md.",
            )

    async def claim(self) -> None:
        """Become the one run.

        Raises:
            RetentionError: another one is at it, or was until a moment ago.
        """
        if not await self.pool.fetch(_sql("claim"), self.owner, self.who, self.lease):
            who, until = (await self.pool.fetch(_sql("holder")))[0]
            raise RetentionError(
                f"{who} is at it, and holds its lease until {until:%Y-%m-%d %H:%M:%S}Z.", cure="wait until it ends."
            )

    async def renew(self) -> None:
        """Stay it. Raises LeaseLost."""
        if not await self.pool.fetch(_sql("renew"), self.owner, self.lease):
            raise LeaseLost("Another retention run has taken over.")

    async def release(self) -> None:
        """Let the next one in at once."""
        await self.pool.fetch(_sql("release"), self.owner)

    @asynccontextmanager
    async def _fenced(self) -> AsyncIterator[Any]:
        async with self.pool.transaction(bound=SHORT) as tx:
            await fetch(tx, _sql("fence"), (self.owner,))
            yield tx

    async def about(self) -> tuple[UUID, int, datetime]:
        """The log's id, the number of the newest migration, and the database's time."""
        log_id, version, now = (await self.pool.fetch(_sql("about")))[0]
        return UUID(int=log_id.int), version, now

    async def partitions(self) -> list[Partition]:
        """The partitions that the log has left behind, oldest first."""
        return [
            Partition(
                name=name,
                lower_position=lower,
                upper_position=upper,
                size=size,
                tick_id=tick,
                behind=tuple(behind or ()),
            )
            for name, lower, upper, size, tick, behind in await self.pool.fetch(_sql("partitions"))
        ]

    async def types(self, lower: int, upper: int) -> dict[str, datetime]:
        """The event types of a partition, each with the time when it was last recorded there."""
        rows = await self.pool.fetch_planned(_sql("types"), lower, upper)
        return {row[0]: row[1] for row in rows}

    async def reach(self, after: int, upper: int, types: Sequence[str] | None, rows: int, size: int) -> int | None:
        """The last position of the next page, which has about so many bytes at most; None: there is none."""
        found = await self.pool.fetch_planned(_sql("reach"), after, upper, types, rows, size)
        last: int | None = found[0][0]
        return last

    async def page(self, after: int, upper: int, types: Sequence[str] | None, limit: int) -> list[Row]:
        """The next rows of a partition."""
        return await self.pool.fetch_planned(SELECT + _sql("page"), after, upper, types, limit)

    async def count(self, lower: int, upper: int, types: Sequence[str] | None) -> int:
        """How many there are."""
        return int((await self.pool.fetch_planned(_sql("count"), lower, upper, types))[0][0])

    async def archives(self, which: str = "all") -> list[Archive]:
        """``all`` archives, or the ``unfinished``."""
        return [_archive(row) for row in await self.pool.fetch(f"{_sql('columns')}\n{_sql(which)}")]

    async def open(
        self, partition: Partition, types: Sequence[str], *, whole: bool, location: str
    ) -> Archive:  # fmt: skip
        """Note an archive before anything of it is written."""
        archive_id = uuid4()
        lower, upper = partition.lower_position, partition.upper_position
        async with self._fenced() as tx:
            given = (archive_id, lower, upper, list(types), whole, location, partition.tick_id, self.who)
            await fetch(tx, _sql("open"), given)
        return next(each for each in await self.archives("unfinished") if each.archive_id == archive_id)

    async def relocate(self, archive: Archive, location: str) -> None:
        """Begin it anew at another place."""
        await self._change("relocate", archive, location)

    async def verified(self, archive: Archive, manifest: Manifest, digest: str) -> None:
        """It is whole, and was read back."""
        span = (manifest.first_position, manifest.last_position, manifest.first_timestamp, manifest.last_timestamp)
        await self._change("verified", archive, manifest.events, manifest.size, *span, digest)

    async def abandon(self, archive: Archive) -> None:
        """Forget an archive of which nothing was removed yet."""
        await self._change("abandon", archive)

    async def begin(self, archive: Archive, force: Force | None) -> tuple[str, ...]:
        """Move the log's start behind it; the readers that forbid it, if there are any. Then nothing was done."""
        told = (force.by, force.why) if force is not None else (None, None)
        return tuple((await self.pool.fetch(_sql("begin"), self.owner, archive.archive_id, *told))[0][0])

    async def drop(self, archive: Archive) -> str:
        """Drop its partition: ``dropped``, ``busy`` or ``different``."""
        outcome: str = (await self.pool.fetch(_sql("drop"), self.owner, archive.archive_id))[0][0]
        return outcome

    async def thin(self, archive: Archive, event_type: str, after: int, most: int) -> tuple[int, int | None]:
        """Delete some of its events of a type: how many, and the last position."""
        rows = await self.pool.fetch(_sql("thin"), self.owner, archive.archive_id, event_type, after, most)
        return rows[0][0], rows[0][1]

    async def removed(self, archive: Archive) -> None:
        """Nothing of it is left in the log."""
        await self._change("removed", archive)

    async def _change(self, name: str, archive: Archive, *values: Any) -> None:
        async with self._fenced() as tx:
            if not await fetch(tx, _sql(name), (archive.archive_id, *values)):
                raise LeaseLost(f"Archive {archive.archive_id} is not where this run left it.")

    async def accept(self, reader: str, *, by: str, why: str) -> int:
        """Let a reader go on with what is left; up to which tick.

        Raises:
            ValidationError: ``by`` or ``why`` says nothing, or the name is a consumer's without ``consumer:``.
        """
        given = line("reader", reader), line("who", by), line("why", why)
        if await self.pool.fetch(blocks("replays")["passed"], f"consumer:{reader}"):  # noted for one that never comes
            raise ValidationError(
                f"{reader!r:.200} is a consumer; as a reader of the log it has another name.",
                cure=f"name it as it reads: consumer:{reader:.100}.",
            )
        return int((await self.pool.fetch(_sql("accept"), *given))[0][0])


def _archive(row: Row) -> Archive:
    (
        archive_id, lower, upper, types, whole, state, location, tick_id, events, size, first, last, digest, made_by,
        started_at, verified_at, removed_at, forced_by, forced_why, overtaken,
    ) = row  # fmt: skip
    return Archive(
        archive_id=UUID(int=archive_id.int), lower_position=lower, upper_position=upper, event_types=tuple(types),
        whole=whole, state=ArchiveState(state), location=location, tick_id=tick_id, events=events, size=size,
        first_position=first, last_position=last, manifest_sha256=digest, made_by=made_by, started_at=started_at,
        verified_at=verified_at, removed_at=removed_at, forced_by=forced_by, forced_why=forced_why,
        overtaken=tuple(overtaken or ()),
    )  # fmt: skip


def _sql(name: str) -> str:
    return blocks("retention")[name]
