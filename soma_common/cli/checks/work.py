"""What is to be done: does anybody do it?"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

from soma_common.cli.checks.connecting import asked, unpooled
from soma_common.cli.checks.findings import Finding, Limits, Subject, fail, ok, skipped, warn
from soma_common.config import SomaConfig
from soma_common.errors import DatabaseUnavailable, SomaError
from soma_common.moments import span
from soma_common.postgres.pool import Pool

_COUNTED: Final = 10_000
_RESTART: Final = 30.0  # seconds
_LONGEST_LEASE: Final = 86_400.0  # seconds: no setting takes more


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Relay, consumers of the log, dead letters, sagas."""
    config = SomaConfig.from_env(subject.env)
    async with unpooled(config, subject.limits.within) as pool:
        try:
            readers = await asked(pool, "readers")
            waiting, oldest = (await asked(pool, "waiting"))[0]
        except DatabaseUnavailable:
            yield skipped("relay", "the database cannot be reached")
            return
        except SomaError as error:
            yield skipped("relay", f"the tables cannot be read: {error.message}")
            return
        if config.uses_kafka:
            yield _relay([row for row in readers if row[0].startswith("relay:")], waiting, oldest, subject.limits)
            yield await _parked(pool)
        yield _consumers([row for row in readers if not row[0].startswith("relay:")], subject.limits)
        yield _leases(readers)
        yield await _letters(pool)
        yield await _sagas(pool)


def _soon(limits: Limits) -> float:
    """Seconds after which somebody should be at work: a process that begins anew takes some."""
    return min(limits.old, _RESTART)


def _many(count: int) -> str:
    return f"more than {_COUNTED:,}" if count > _COUNTED else f"{count:,}"


def _relay(relays: Sequence[Any], waiting: int, oldest: float, limits: Limits) -> Finding:
    run = "run `somastack relay`, under the name of the service."
    if not relays:
        if not waiting or oldest < _soon(limits):
            return ok("relay", "there is nothing to send yet" if not waiting else "the first events were just recorded")
        text = f"{_many(waiting)} events wait, the oldest since {span(oldest)}, and no relay was ever here"
        return fail("relay", text, run)
    alive, behind = sum(row[1] for row in relays), max(row[3] for row in relays)
    text = f"{alive} at work, {_many(behind)} events behind"
    since = max(row[4] for row in relays)
    if behind and not alive and since > _soon(limits):
        return fail("relay", f"{text}, the oldest since {span(since)}", run)
    if behind and since > limits.old:
        cure = "its log says what it waits for; `somastack doctor --only kafka` whether Kafka answers."
        return warn("relay", f"{text}, the oldest since {span(since)}", cure)
    return ok("relay", text)


async def _parked(pool: Pool) -> Finding:
    rows = await asked(pool, "parked")
    total = sum(row[1] for row in rows)
    if not total:
        return ok("parked", "no row is put aside")
    cure = "`somastack dlq list --all-tenants` shows why; mend it, then `somastack dlq retry`."
    return warn("parked", f"Kafka took {total} rows not", cure)


def _consumers(consumers: Sequence[Any], limits: Limits) -> Finding:
    late = [row for row in consumers if row[3] and row[4] > (limits.old if row[1] else _soon(limits))]
    if not late:
        return ok("consumers of the log", f"{len(consumers)}, none is behind" if consumers else "there are none")
    name, alive, _, behind, oldest, _ = late[0]
    who = f"{name.removeprefix('consumer:')}: {alive} at work, up to {_many(behind)} events behind"
    who += f", the oldest since {span(oldest)}"
    return warn("consumers of the log", who, "run its application: `somastack worker MODULE:NAME`.")


def _leases(readers: Sequence[Any]) -> Finding:
    far = [row for row in readers if row[5] > _LONGEST_LEASE]
    if far:
        text = f"{far[0][0]} is leased for {span(far[0][5])}: the database's clock was set back"
        return warn("leases", text, "end its processes, and set leased_until of its rows in soma.shards to now.")
    return ok("leases", f"{len(readers)} readers")


async def _letters(pool: Pool) -> Finding:
    try:
        rows = await asked(pool, "gauges", file="dead_letters")
    except SomaError as error:
        return skipped("dead letters", error.message)
    total, dead = sum(row[2] for row in rows), sum(row[2] for row in rows if row[1] == "dead")
    if not total:
        return ok("dead letters", "none is open")
    oldest = max(row[3] for row in rows)
    text = f"{total} open, {dead} of them dead; the oldest since {span(oldest)}"
    return warn(
        "dead letters",
        text,
        "`somastack dlq summary --all-tenants` says which; mend the cause, then `somastack dlq retry`.",
    )


async def _sagas(pool: Pool) -> Finding:
    try:
        counts = dict(map(tuple, await asked(pool, "sagas")))
    except SomaError as error:
        return skipped("sagas", error.message)
    stuck = counts.pop("stuck", 0)
    under_way = sum(counts.values())
    if stuck:
        return warn(
            "sagas", f"{stuck} stuck, {under_way} under way", "`somastack saga list --all-tenants --status stuck`"
        )
    return ok("sagas", f"{under_way} under way, none stuck")
