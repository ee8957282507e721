"""What transactional steps did, kept in the transaction of the effect: a second attempt is told, and does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Final, NamedTuple

from soma_common.errors import StepRefused
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

_SQL: Final = blocks("temporal")
_AT_ONCE: Final = 1000


class Effect(NamedTuple):
    """A step that was done, and its result as JSON."""

    result: bytes


async def begin(connection: Any, key: str, attempt: int) -> Effect | None:
    """Claim a step in a transaction; what an earlier attempt did, if one did it. Waits for one that is at work.

    The transaction has a bound (``Runner.transaction``), so that nobody waits for a paused process for ever.

    Raises:
        StepRefused: this attempt was given up; a later one is on its way, or the saga went another way.
    """
    if await fetch(connection, _SQL["begin"], (key, attempt)):
        return None
    found: Sequence[Any] = await fetch(connection, _SQL["result"], (key,))
    if found[0][0] is None:
        raise StepRefused(f"Attempt {attempt} of {key} comes too late: it was given up.")
    return Effect(found[0][0].encode())


async def keep(connection: Any, key: str, result: bytes) -> None:
    """Keep the outcome; it commits with the effect."""
    await fetch(connection, _SQL["keep"], (key, result.decode()))


async def settle(pool: Pool, key: str, attempt: int) -> Effect | None:
    """Whether a step was done by this attempt or an earlier one; if not, none of them can do it any more."""
    rows = await pool.fetch(_SQL["settle"], key, attempt)
    return None if rows[0][0] is None else Effect(rows[0][0].encode())


async def forget(pool: Pool, older_than: timedelta) -> int:
    """Remove outcomes of long ago; how many there were."""
    removed = 0
    while True:
        rows = await pool.fetch(_SQL["forget"], older_than.total_seconds(), _AT_ONCE)
        removed += len(rows)
        if len(rows) < _AT_ONCE:
            return removed
