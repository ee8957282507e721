"""The tables that a rebuild fills: new ones of the same names in a schema of their own, until the swap."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from soma_common.errors import InfrastructureError, ReplayRefused, SomaError, TransactionConflict, ValidationError
from soma_common.postgres.errors import is_from_driver
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_MOST_NAME: Final = 63  # bytes of a name in PostgreSQL
_PAGE: Final = 5000  # rows of the inbox that one statement of the cleaning looks at
_CLEANING: Final = "5s"  # how long a drop waits for readers of the old tables
_FIRST: Final = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Projection:
    """The tables of one consumer, and how their successors are made.

    Handlers name these tables without a schema, and write to no others: a rebuild sends the bare names to the new
    tables, and refuses a batch that wrote to anything else.

    Args:
        tables: all tables that the consumer's handlers write to, without a schema.
        schema: where they are.
        create: statements that make the new tables, by bare names (they run in an empty schema). None: the new ones are
            like the old ones, with their defaults, constraints, indexes, grants and owner.

    Raises:
        ValidationError: no table, or what cannot be a name.
    """

    tables: tuple[str, ...]
    schema: str = "public"
    create: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.tables, str):
            raise ValidationError(f"tables={self.tables!r:.80} is one text.", cure="pass a tuple of names.")
        object.__setattr__(self, "tables", tuple(self.tables))
        if not self.tables or len(set(self.tables)) < len(self.tables):
            raise ValidationError("A projection names each of its tables once, and at least one.", cure="name them.")
        for name in (*self.tables, self.schema):
            if not isinstance(name, str) or not name or "\0" in name or not _fits(name):
                raise ValidationError(
                    f"{name!r:.80} is not a name of a table or schema.", cure=f"use 1 to {_MOST_NAME} bytes."
                )
        if self.create is not None and (not isinstance(self.create, str) or "\0" in self.create):
            raise ValidationError("create is not a text of SQL statements.", cure="pass CREATE TABLE statements.")


def _fits(name: str) -> bool:
    try:
        return len(name.encode()) <= _MOST_NAME
    except UnicodeEncodeError:
        return False


@dataclass(frozen=True, slots=True)
class Shadow:
    """What a rebuild fills, as its row tells. ``old_inbox`` and the old tables are left over after the swap."""

    run_id: UUID
    live_schema: str
    schema: str
    tables: tuple[str, ...]
    own_shape: bool
    shape: str
    inbox_id: int
    old_inbox: int | None
    swapped: bool
    cleaned: bool

    @classmethod
    async def find(cls, pool: Pool, run_id: UUID, inbox_id: int) -> Shadow:
        """Of a recorded rebuild."""
        live, schema, tables, own, shape, old, swapped, cleaned = (await pool.fetch(_sql("find"), run_id))[0]
        return cls(
            run_id, live, schema, tuple(tables), own, shape, inbox_id, old, swapped is not None, cleaned is not None
        )

    async def analyze(self, pool: Pool) -> None:
        """Statistics of the new tables: the first queries after the swap shall not be planned as for empty ones."""
        for table in self.tables:
            await pool.fetch((await pool.fetch(_sql("analyze"), self.schema, table))[0][0])

    async def lock(self, tx: Any) -> None:
        """Keep everybody from the old tables until the transaction ends; in one order, so that two cannot deadlock."""
        for row in await fetch(tx, _sql("lock_tables"), (self.live_schema, list(self.tables))):
            await fetch(tx, row[0], ())

    async def detach(self, tx: Any) -> None:
        """Let serial sequences that only the old tables draw from go with them: new ones may bring the same names."""
        rows = await fetch(tx, _sql("outgrown"), (self.live_schema, list(self.tables), f"{self.schema}_old"))
        for statement in (each for row in rows for each in row):
            await fetch(tx, statement, ())

    async def check(self, tx: Any) -> None:
        """That nothing came up since the rebuild began that the swap would break.

        Raises:
            ReplayRefused: a view or a foreign key points to an old table, or its columns changed.
        """
        await check_obstacles(tx, self.live_schema, self.tables, own_shape=self.own_shape)
        if not self.own_shape and await shape_of(tx, self.live_schema, self.tables) != self.shape:
            raise ReplayRefused(
                f"Tables of {self.live_schema} were changed since this rebuild began: its new ones lack that.",
                cure="cancel it and start again.",
            )

    async def clean(self, pool: Pool) -> None:
        """Drop what the run or its swap left over, in small steps. May be called again until it ends without an error.

        Raises:
            ReplayRefused: somebody still reads the old tables.
        """
        if self.cleaned:
            return
        for schema in (f"{self.schema}_old", self.schema):
            await self._drop(pool, schema)
        left = self.old_inbox if self.swapped else self.inbox_id
        assert left is not None
        after: UUID | None = _FIRST
        while after is not None:
            after = (await pool.fetch(_sql("clean_inbox"), left, after, _PAGE))[0][0]
        while (await pool.fetch(_sql("clean_inbox_keys"), left, _PAGE))[0][0]:
            pass
        await pool.fetch(_sql("cleaned"), self.run_id)

    async def _drop(self, pool: Pool, schema: str) -> None:
        try:
            async with pool.transaction() as tx:
                await fetch(tx, _sql("lock_patience"), (_CLEANING,))
                await tx.execute((await fetch(tx, _sql("drop_schema"), (schema,)))[0][0])
        except Exception as error:
            if not is_locked(error):
                raise
            raise ReplayRefused(
                f"The tables in {schema} are still in use.", cure="end those transactions and clean again."
            ) from error


async def make_tables(tx: Any, projection: Projection, shadow: str) -> None:
    """The new tables, empty, in a schema of their own, in the transaction ``tx``.

    Raises:
        ReplayRefused: the statements of ``create`` failed or made something else.
    """
    for schema in (shadow, f"{shadow}_old"):
        await tx.execute((await fetch(tx, _sql("make_schema"), (schema,)))[0][0])
    if projection.create is None:
        for table in projection.tables:
            await fetch(tx, _sql("make_shadow"), (projection.schema, table, shadow))
    else:
        await _make_own(tx, projection, shadow)
    for table in projection.tables:
        await fetch(tx, _sql("copy_rights"), (projection.schema, table, shadow))


async def _make_own(tx: Any, projection: Projection, shadow: str) -> None:
    try:
        await fetch(tx, _sql("make_own"), (projection.create, shadow))
    except Exception as error:
        if isinstance(error, InfrastructureError | TransactionConflict) or not (
            isinstance(error, SomaError) or is_from_driver(error)
        ):
            raise
        raise ReplayRefused(f"The new tables cannot be made: {error}.", cure="mend create.") from error
    made = {row[0] for row in await fetch(tx, _sql("made"), (shadow,))}
    if made != set(projection.tables):
        raise ReplayRefused(
            f"create makes {', '.join(sorted(made)) or 'nothing'}, not {', '.join(sorted(projection.tables))}.",
            cure="create each table by its bare name, and no more.",
        )


async def check_obstacles(tx: Any, schema: str, tables: tuple[str, ...], *, own_shape: bool) -> None:
    """That a swap of these tables loses nothing.

    Raises:
        ReplayRefused: something would; the message names it.
    """
    found = [row[0] for row in await fetch(tx, _sql("obstacles"), (schema, list(tables), own_shape))]
    if found:
        raise ReplayRefused(
            f"These tables cannot be rebuilt: {'; '.join(found)}.",
            cure="drop what points to them and make it anew after the swap; name plain tables of your own; or pass"
            " create, with statements that make them whole.",
        )


async def shape_of(tx: Any, schema: str, tables: tuple[str, ...]) -> str:
    """A text that is another one when columns, indexes or constraints change."""
    return str((await fetch(tx, _sql("shape"), (schema, list(tables))))[0][0])


def is_locked(error: BaseException) -> bool:
    """Whether a lock could not be had in the time that was given."""
    return "55P03" in _states(error)


def took_too_long(error: BaseException) -> bool:
    """Whether PostgreSQL ended a transaction for its age or its silence."""
    return not _states(error).isdisjoint(("25P03", "25P04"))


def _states(error: BaseException | None) -> set[str]:
    """The SQLSTATEs of an error and its causes."""
    found = set()
    while error is not None:
        found.add(getattr(error, "sqlstate", None) or "")
        error = error.__cause__
    return found


def _sql(name: str) -> str:
    return blocks("rebuilds")[name]
