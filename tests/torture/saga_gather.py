"""Reads a torture run of sagas back: the journals of its processes, and everything that the database has."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import orjson

from tests.torture import saga_starters
from tests.torture.journal import read
from tests.torture.saga_bank import EVENT
from tests.torture.saga_history import Account, Ack, Act, Called, Known, Line, Moved, Sent, Story, Told
from tests.torture.saga_plans import Plan, draw

_SAGAS = "SELECT saga_id::text, saga_key, name, status, length, input::text FROM soma.sagas"
_LINES = """
SELECT saga_id::text, number, step, what, attempt, epoch, coalesce(error_type, ''), who, why, result::text
FROM soma.saga_steps ORDER BY saga_id, number
"""
_MOVED = """
SELECT saga_id::text, step, undo, account, cents FROM ledger ORDER BY place
"""
_EVENTS = "SELECT aggregate_id, causation_id FROM soma.events WHERE event_type = $1"
_CALLED = "SELECT key, charged, refunded, charges, refunds, clash FROM bank"
_SENT = "SELECT saga_id::text, signal_id, payload::text::bigint, taken FROM soma.saga_signals ORDER BY number"
_LETTERS = """
SELECT event_id::text, count(*) FILTER (WHERE status NOT IN ('resolved', 'discarded')), count(*)
FROM soma.dead_letters WHERE partition = -2 GROUP BY 1
"""
_ACCOUNTS = """
SELECT a.account, a.opening, a.balance, coalesce(e.cents, 0)::bigint
FROM accounts a FULL JOIN (SELECT account, sum(cents) AS cents FROM ledger GROUP BY 1) e USING (account)
"""
_LEFT = """
SELECT count(*) FILTER (WHERE status NOT IN ('completed', 'compensated', 'stuck')), coalesce(sum(length), 0)
FROM soma.sagas
"""
# How long sagas that a killed worker had waited for the next entry of somebody else.
_WAITED = """
SELECT extract(epoch FROM min(j.at) - to_timestamp(d.at))::float8
FROM unnest($1::uuid[], $2::bigint[], $3::float8[]) AS d (saga_id, epoch, at)
JOIN soma.saga_steps j ON j.saga_id = d.saga_id AND j.epoch > d.epoch AND j.at > to_timestamp(d.at) AND j.who IS NULL
GROUP BY d.saga_id, d.epoch, d.at
"""


def known(folder: Path) -> Known:
    """What the processes wrote down."""
    starters = [line for path in folder.glob("*.starter.jsonl") for line in read(path)]
    acks = [Ack(int(n), each, line["t"]) for line in starters if line["s"] == "ok" for n, each in line["i"].items()]
    return Known(
        tried=frozenset(saga_starters.read_numbers(starters)),
        rolled_back=frozenset(n for line in starters if line["s"] == "no" for n in line["n"]),
        acks=acks,
        acts=list(_acts(folder)),
        signals=[Told(line["g"], line["c"], line["t"]) for line in starters if line["s"] == "signal"],
        wrong=[line["n"] for line in starters if line["s"] == "wrong"],
    )


def _acts(folder: Path) -> Iterator[Act]:
    for path in folder.glob("*.operator.jsonl"):
        found: dict[str, Act] = {}
        for line in read(path):
            answer = "" if line["s"] == "try" else line["s"]
            found[line["w"]] = Act(line["v"], line["g"], line["w"], answer, line["t"])
        yield from found.values()


async def left(dsn: str) -> tuple[int, int]:
    """How many sagas have not ended, and how many entries all journals have."""
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        row = await connection.fetchrow(_LEFT, timeout=120)
        return int(row[0]), int(row[1])
    finally:
        await connection.close()


async def stories(dsn: str, seed: int) -> list[Story]:
    """Every saga that there is."""
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            return await _stories(connection, seed)
    finally:
        await connection.close()


async def _stories(connection: Any, seed: int) -> list[Story]:
    lines: dict[str, list[Line]] = defaultdict(list)
    for saga_id, *told, result in await connection.fetch(_LINES):
        lines[saga_id].append(Line(*told)._replace(result=_number(result)))
    events: dict[str, Counter[str]] = defaultdict(Counter)
    for saga_id, cause in await connection.fetch(_EVENTS, EVENT):
        events[saga_id][cause] += 1
    calls: dict[str, dict[str, Called]] = defaultdict(dict)
    for key, *rest in await connection.fetch(_CALLED):
        saga_id, _, step = key.partition(":")
        calls[saga_id][step] = Called(*rest)
    sent: dict[str, list[Sent]] = defaultdict(list)
    for saga_id, *rest in await connection.fetch(_SENT):
        sent[saga_id].append(Sent(*rest))
    letters = {row[0]: (row[1], row[2]) for row in await connection.fetch(_LETTERS)}
    moved = _moved(await connection.fetch(_MOVED))
    return [
        Story(
            saga_id, key, name, status, length, _plan(seed, key), orjson.loads(given), lines.get(saga_id, ()),
            moved.get(saga_id, ()), events.get(saga_id, Counter()), calls.get(saga_id, {}), sent.get(saga_id, ()),
            *letters.get(saga_id, (0, 0)),
        )
        for saga_id, key, name, status, length, given in await connection.fetch(_SAGAS)
    ]  # fmt: skip


def _number(result: str | None) -> int | None:
    return int(result) if result is not None and result.lstrip("-").isdigit() else None


def _plan(seed: int, key: str) -> Plan | None:
    return draw(seed, int(key[1:])) if key and key[0] == "n" and key[1:].isdigit() else None


def _moved(rows: Sequence[Any]) -> Mapping[str, list[Moved]]:
    """Rows of the ledger, two by two: an act writes both in one statement, and only such rows make a pair."""
    found: dict[str, list[Moved]] = defaultdict(list)
    waiting: dict[tuple[str, str, bool], tuple[int, int]] = {}
    for saga_id, step, undo, account, cents in rows:
        place = (saga_id, step, undo)
        other = waiting.pop(place, None)
        if other is None:
            waiting[place] = (account, cents)
            continue
        (debit, lost), (credit, gained) = sorted([other, (account, cents)], key=lambda row: row[1])
        found[saga_id].append(Moved(step, undo, debit, credit, gained, 2 if lost == -gained else 0))
    for (saga_id, step, undo), (account, cents) in waiting.items():
        found[saga_id].append(Moved(step, undo, account, account, cents, 1))
    return found


async def accounts(dsn: str) -> list[Account]:
    """Every account with the sum of its entries."""
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        return [Account(*row) for row in await connection.fetch(_ACCOUNTS)]
    finally:
        await connection.close()


async def waited(dsn: str, deaths: Sequence[tuple[str, int, float]]) -> list[float]:
    """Seconds that sagas waited after their worker was killed."""
    connection = await asyncpg.connect(dsn, timeout=30)
    try:
        columns = [list(column) for column in zip(*deaths, strict=True)] or [[], [], []]
        return [row[0] for row in await connection.fetch(_WAITED, *columns)]
    finally:
        await connection.close()


__all__ = ["accounts", "known", "left", "stories", "waited"]
