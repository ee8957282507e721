"""What people do with dead letters: find, show, edit, try again, give up."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import orjson
from pydantic import BaseModel

from soma_common.dlq.failures import storable
from soma_common.dlq.filters import LetterFilter, cursor_of, letter_id_of, where
from soma_common.dlq.models import OPEN, FullLetter, HistoryEntry, Letter, LetterPage, Status, Summary
from soma_common.dlq.rows import FULL_LETTERS, LETTERS, full_letter_of, letter_of
from soma_common.errors import EventTooLarge, LetterChanged, LetterNotFound, ValidationError
from soma_common.events.payloads import to_json
from soma_common.postgres.bounds import SHORT
from soma_common.postgres.pool import Pool, fetch
from soma_common.sql.loader import blocks

MOST_LISTED = 1000
MOST_VALUE = 16 * 1024 * 1024  # bytes of an edited value
_MARKABLE = (Status.DEAD, Status.RETRYING)
BATCH = 500
_RELAY = "relay:"  # the consumer of letters of the stage publish begins so
_SAGA = "saga:"  # and so the one of sagas that are stuck
_SENDING = "sending"  # what the database says of a row that is not given up now


async def find(
    pool: Pool, wanted: LetterFilter, *, cursor: str | None = None, limit: int = 100, newest_first: bool = False
) -> LetterPage:
    """A page of letters in the order in which they were parked.

    Raises:
        ValidationError: a cursor that no page gave, or a limit outside 1..1000.
    """
    if not isinstance(limit, int) or not 1 <= limit <= MOST_LISTED:
        raise ValidationError(f"limit is {limit!r:.80}.", cure=f"use 1 to {MOST_LISTED}.")
    after = cursor_of(cursor)
    sql, args = compose(wanted, after, limit + 1, newest_first=newest_first)
    rows = await pool.fetch_planned(sql, *args)
    letters = tuple(letter_of(row) for row in rows[:limit])
    return LetterPage(letters, str(letters[-1].place) if len(rows) > limit else None)


def compose(
    wanted: LetterFilter, after: int | None, limit: int, *, newest_first: bool = False
) -> tuple[str, list[Any]]:
    """The statement of a page and its parameters."""
    conditions = wanted.conditions()
    if after is not None:
        conditions["before" if newest_first else "after"] = after
    clause, args = where(conditions)
    order = blocks("dead_letters")["newest_first" if newest_first else "oldest_first"]
    return LETTERS + clause + order.replace("$n", f"${len(args) + 1}"), [*args, limit]


async def show(pool: Pool, letter_id: UUID | str) -> FullLetter:
    """One letter with everything that is kept of it.

    Raises:
        LetterNotFound: there is no such letter.
    """
    given = letter_id_of(letter_id)
    rows = await pool.fetch(FULL_LETTERS + blocks("dead_letters")["by_id"], given)
    if not rows:
        raise _not_found(given)
    return full_letter_of(rows[0])


async def summary(pool: Pool, wanted: LetterFilter, after: int | None = None) -> list[Summary]:
    """Letters counted by consumer, status and fingerprint, behind a place; the largest groups first."""
    sql = blocks("dead_letters")
    clause, args = where(wanted.conditions() | ({} if after is None else {"after": after}))
    rows = await pool.fetch_planned(f"{sql['summary']}\n{sql['source']}\n{clause}{sql['summary_groups']}", *args)
    return [
        Summary(row[0], Status(row[1]), row[2], row[3], row[4], row[5], UUID(int=row[6].int), *row[7:]) for row in rows
    ]


async def retry(pool: Pool, letter_id: UUID | str, *, who: str, why: str | None = None) -> bool:
    """Ask for another try of a letter's whole sequence, in order; False when that was asked before or it is settled.

    Raises:
        LetterNotFound: there is no such letter.
    """
    given = letter_id_of(letter_id)
    marked = await mark(pool, [given], who, why)
    if not marked and not await pool.fetch(blocks("dead_letters")["status"], given):
        raise _not_found(given)
    return bool(marked)


async def can_retry(pool: Pool, letter_id: UUID | str) -> bool:
    """Whether ``retry`` would ask for something.

    Raises:
        LetterNotFound: there is no such letter.
    """
    given = letter_id_of(letter_id)
    rows = await pool.fetch(blocks("dead_letters")["can_retry"], given)
    if not rows:
        raise _not_found(given)
    return bool(rows[0][0])


async def retry_many(
    pool: Pool, wanted: LetterFilter, *, who: str, why: str | None = None, most: int | None = None
) -> AsyncIterator[int]:
    """Ask for another try of all dead and retrying letters that match, oldest first, in small transactions.

    Yields how many letters were marked by each: whole sequences, so there may be more than match. When it is broken
    off, what was marked stays so, and calling it again goes on with the rest.

    Args:
        most: matching letters to take at most.
    """
    after, left = 0, most
    while left is None or left > 0:
        limit = BATCH if left is None else min(BATCH, left)
        letters = await page_of_markable(pool, wanted, after, limit)
        if letters:
            yield len(await mark(pool, [letter.letter_id for letter in letters], who, why))
            after = letters[-1].place
        if len(letters) < limit:
            return
        left = None if left is None else left - len(letters)


async def page_of_markable(pool: Pool, wanted: LetterFilter, after: int | None, limit: int) -> list[Letter]:
    """The next letters for which another try can be asked, oldest first."""
    sql, args = compose(markable(wanted), after, limit)
    return [letter_of(row) for row in await pool.fetch_planned(sql, *args)]


async def count_markable(pool: Pool, wanted: LetterFilter, after: int | None = None) -> int:
    """How many dead and retrying letters match, behind a place."""
    return sum(group.count for group in await summary(pool, markable(wanted), after))


def markable(wanted: LetterFilter) -> LetterFilter:
    """The filter, of letters for which another try can be asked."""
    asked = _MARKABLE if wanted.statuses is None else wanted.statuses
    return replace(wanted, statuses=[status for status in _MARKABLE if status in asked])


async def mark(pool: Pool, letters: list[UUID], who: str, why: str | None) -> list[UUID]:
    """Ask for another try of the sequences of these letters, in one transaction; the letters that changed."""
    args = (letters, storable(who, 512), _reason(why))
    async with pool.transaction(bound=SHORT) as tx:
        return [row[0] for row in await fetch(tx, blocks("dead_letters")["redrive"], args)]


async def edit(
    pool: Pool, letter: FullLetter, value: Any, *,
    who: str, why: str | None = None, raw: bool = False, dry_run: bool = False,
) -> int:  # fmt: skip
    """Give an open letter another value; the original stays. Returns the new revision.

    Args:
        letter: as it was shown: an edit by somebody else in between is refused.
        value: bytes, or what is written as JSON. Where the original is JSON, bytes must be JSON too, unless ``raw``.
        dry_run: only say what would be refused; returns the revision that there is.

    Raises:
        ValidationError, EventTooLarge: the value cannot be a record's, or the letter is a relay's.
        LetterNotFound, LetterChanged: it is gone, settled, or was edited meanwhile.
    """
    written = _editable(letter, value, raw=raw)
    known = letter.letter
    if dry_run:
        return known.revision
    args = (known.letter_id, written, storable(who, 512), _reason(why), known.revision)
    async with pool.transaction(bound=SHORT) as tx:
        rows = await fetch(tx, blocks("dead_letters")["edit"], args)
    if rows:
        return int(rows[0][0])
    now = await pool.fetch(blocks("dead_letters")["status"], known.letter_id)
    if not now:
        raise _not_found(known.letter_id)
    raise _changed(known, *now[0])


def _editable(letter: FullLetter, value: Any, *, raw: bool = False) -> bytes:
    """The bytes that an edit would write, if the letter, as it was shown, can be edited so.

    Raises:
        ValidationError, EventTooLarge, LetterChanged: as :func:`edit`.
    """
    known = letter.letter
    if known.consumer.startswith(_RELAY):
        raise ValidationError(
            "The event of this letter is recorded in the log: its bytes cannot be changed.",
            cure="mend the topic and retry it, or discard it and publish another event.",
        )
    if known.consumer.startswith(_SAGA):
        raise ValidationError(
            "The letter of a saga holds what it was started with, which cannot be changed.",
            cure=f"see `somastack saga inspect {known.event.event_id}`.",
        )
    if known.status not in OPEN:
        raise _changed(known, known.status, known.revision)
    return _bytes_of(value, letter.record.value, raw=raw)


async def discard(pool: Pool, letter_id: UUID | str, *, who: str, reason: str) -> bool:
    """Give an open letter up; what stands behind it goes on. False when it was discarded before.

    Raises:
        ValidationError: without a reason; or it is a saga's.
        LetterNotFound: there is no such letter.
        LetterChanged: it was resolved, or the relay is sending it.
    """
    given = letter_id_of(letter_id)
    if not isinstance(reason, str) or not reason.strip():
        raise ValidationError("A letter is discarded for a reason.", cure="say why.")
    args = (given, storable(who, 512), _reason(reason))
    async with pool.transaction(bound=SHORT) as tx:
        before = (await fetch(tx, blocks("dead_letters")["discard"], args))[0][0]
    if before is None:
        raise _not_found(given)
    if before == _SENDING:
        raise LetterChanged(
            f"Letter {given} is being sent by its relay.", cure="see what becomes of it, then discard it."
        )
    if before == "saga":
        raise ValidationError(
            f"Letter {given} is settled with its saga.", cure="see `somastack saga retry|skip|resolve|compensate`."
        )
    if before == Status.RESOLVED:
        raise LetterChanged(f"Letter {given} is resolved: it was applied.")
    return bool(before != Status.DISCARDED)


async def history(pool: Pool, letter_id: UUID | str) -> list[HistoryEntry]:
    """What was done with a letter, oldest first; nothing for a letter that does not exist."""
    rows = await pool.fetch(blocks("dead_letters")["history"], letter_id_of(letter_id))
    return [HistoryEntry(*row) for row in rows]


def _bytes_of(value: Any, original: bytes | None, *, raw: bool) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        written = bytes(value)
        if not raw and _is_json(original) and not _is_json(written):
            raise ValidationError("The new value is not JSON, and the original is.", cure="mend it, or pass raw.")
    elif isinstance(value, Mapping | BaseModel):
        written = to_json("The new value", value, MOST_VALUE)
    else:
        try:
            written = orjson.dumps(value)
        except (TypeError, ValueError) as error:
            raise ValidationError(f"The new value cannot be written as JSON: {error}.") from error
    if len(written) > MOST_VALUE:
        raise EventTooLarge(f"The new value has {len(written)} bytes; {MOST_VALUE} are the limit.")
    return written


def _is_json(value: bytes | None) -> bool:
    try:
        orjson.loads(value or b"")
    except orjson.JSONDecodeError:
        return False
    return True


def _reason(why: str | None) -> str | None:
    return None if why is None else storable(why, 2000)


def _changed(known: Letter, status: str, revision: int) -> LetterChanged:
    at = f"revision {revision}" if revision == known.revision else f"revision {revision}, not at {known.revision}"
    return LetterChanged(
        f"Letter {known.letter_id} is {status} at {at}.", cure="show it again; a settled letter cannot be edited."
    )


def _not_found(letter_id: UUID) -> LetterNotFound:
    return LetterNotFound(f"There is no dead letter {letter_id}.", cure="see `somastack dlq list --all-tenants`.")
