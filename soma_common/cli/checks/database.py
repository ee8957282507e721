"""The database: reachable, new enough, migrated, as safe as it must be, and held back by nobody."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from soma_common.cli.checks.connecting import asked, unpooled
from soma_common.cli.checks.findings import Finding, Limits, Subject, fail, failed, ok, skipped, warn
from soma_common.config import SomaConfig
from soma_common.errors import SomaError
from soma_common.moments import span
from soma_common.postgres import migrate
from soma_common.postgres.pool import Pool
from soma_common.sql.loader import blocks

CLOCK: Final = "clock"
_LEAST, _MOST = 15, 18  # majors
_AHEAD = 60.0  # seconds: what an append refuses
_OLD_IDS = 1_500_000_000  # transaction ids; PostgreSQL stops at about 2.1 billion
_LOST: Final = ("unreserved", "lost")


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Everything about PostgreSQL."""
    config = SomaConfig.from_env(subject.env)
    async with unpooled(config, subject.limits.within) as pool:
        try:
            server = (await asked(pool, "server"))[0]
        except SomaError as error:
            yield _away(config, error)
            return
        yield ok("reachable", f"as {server['role']}, {server['bytes'] / 2**20:.0f} MiB")
        yield _version(server)
        yield _primary(server)
        yield await _pooler(pool, config)
        for finding in _safety(server):
            yield finding
        yield _connections(server, config)
        yield await _clock(pool, subject.limits)
        yield await _migrations(config, pool)
        yield await _rights(pool, server)
        yield await _cluster(pool)
        yield await _transactions(pool, subject.limits)
        yield await _prepared(pool, subject.limits)
        yield await _slots(pool)


def _away(config: SomaConfig, error: SomaError) -> Finding:
    if config.postgres_dsn:
        return failed("reachable", error)
    return fail("reachable", f"the embedded database in {config.folder} does not run", "`somastack up` starts it.")


def _version(server: Any) -> Finding:
    major, text = server["number"] // 10_000, f"PostgreSQL {server['version']}"
    if major < _LEAST:
        return fail("version", text, f"upgrade it: this library needs PostgreSQL {_LEAST} to {_MOST}.")
    if major > _MOST:
        return warn("version", text, f"this release was tested on PostgreSQL {_LEAST} to {_MOST}.")
    return ok("version", text)


def _primary(server: Any) -> Finding:
    if server["standby"]:
        cure = "name the primary in SOMASTACK_POSTGRES_DSN, or promote this server."
        return fail("primary", "this server is a standby: it takes no events", cure)
    return ok("primary", "takes writes")


async def _pooler(pool: Pool, config: SomaConfig) -> Finding:
    """A pooler gives out a key of its own in place of the backend's process id."""
    async with pool.connection() as connection:
        direct = await connection.fetchval(blocks("doctor")["backend"]) == connection.get_server_pid()
    if not direct and not config.postgres_pooler:
        cure = "set SOMASTACK_POSTGRES_POOLER=transaction, or name the server itself."
        return fail("pooler", "a pooler stands between, and the settings do not say so", cure)
    if direct and config.postgres_pooler:
        cure = "unset SOMASTACK_POSTGRES_POOLER: prepared statements save time."
        return warn("pooler", "SOMASTACK_POSTGRES_POOLER is set, and there is no pooler", cure)
    return ok("pooler", "none" if direct else "transactions, as the settings say")


def _safety(server: Any) -> list[Finding]:
    """Settings on which the promises rest."""
    rest = "ALTER DATABASE … SET {} = {}, or mend postgresql.conf; then connect anew."
    found = [
        _setting("isolation", server["isolation"], "read committed", "handlers meet conflicts that they do not expect",
                 rest.format("default_transaction_isolation", "'read committed'")),
        _setting("synchronous commit", server["synchronous"], ("on", "remote_apply", "remote_write", "local"),
                 "a crash of the server may lose events that were acknowledged",
                 rest.format("synchronous_commit", "on")),
        _setting("time zone", server["zone"], ("UTC", "Etc/UTC", "GMT"),
                 "SQL of people that has no offset means another time than these commands",
                 rest.format("timezone", "'UTC'")),
        _setting("autovacuum", server["autovacuum"], "on", "tables grow, and transaction ids run out",
                 "set autovacuum = on in postgresql.conf."),
    ]  # fmt: skip
    if server["read_only"] == "on":
        found.append(
            fail(
                "read only", "default_transaction_read_only is on", rest.format("default_transaction_read_only", "off")
            )
        )
    if "off" in (server["fsync"], server["full_pages"]):
        cure = "set fsync = on and full_page_writes = on in postgresql.conf."
        found.append(fail("disk writes", "fsync or full_page_writes is off: a power cut destroys the database", cure))
    if server["age"] > _OLD_IDS:
        text = f"{server['age']:,} transaction ids are in use"
        found.append(fail("transaction ids", text, "VACUUM FREEZE; see who holds old transactions open."))
    return found


def _setting(check: str, value: str, wanted: str | tuple[str, ...], why: str, cure: str) -> Finding:
    good = value == wanted if isinstance(wanted, str) else value in wanted
    return ok(check, value) if good else warn(check, f"{value}: {why}", cure)


def _connections(server: Any, config: SomaConfig) -> Finding:
    text = f"{server['connections']} of {server['most']} in use, a process of this service takes {config.pool_size}"
    if server["connections"] + config.pool_size > 0.9 * server["most"]:
        return warn("connections", text, "raise max_connections, lower SOMA_POOL_SIZE, or use a pooler.")
    return ok("connections", text)


async def _clock(pool: Pool, limits: Limits) -> Finding:
    await asked(pool, "clock")  # the second answer is not late by a connection
    began, ours = time.monotonic(), datetime.now(UTC)
    theirs = (await asked(pool, "clock"))[0][0]
    half = timedelta(seconds=time.monotonic() - began) / 2
    return clock(CLOCK, "the server's", (theirs - ours - half).total_seconds(), half.total_seconds(), limits)


def clock(check: str, whose: str, ahead: float, give: float, limits: Limits) -> Finding:
    """A clock beside ours; ``ahead`` and ``give`` are seconds."""
    text = f"{whose} is {abs(ahead) * 1000:.0f} ms {'ahead' if ahead > 0 else 'behind'} (± {give * 1000:.0f} ms)"
    cure = "let both machines keep time by NTP (chrony), and see which one is wrong."
    if check == CLOCK and -ahead - give > _AHEAD:
        return fail(check, f"{text}: appends of this machine are refused", cure)
    if abs(ahead) - give > limits.skew:
        return warn(check, text, cure)
    return ok(check, text)


async def _migrations(config: SomaConfig, pool: Pool) -> Finding:
    try:
        known = await migrate.status(pool.settings.dsn)
    except SomaError as error:
        return failed("migrations", error)
    missing = [f"{each.version:04d}_{each.name}" for each in known if each.applied_at is None]
    if missing:
        some = f"{', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}"
        return fail("migrations", f"{len(missing)} are missing: {some}", "run `somastack db upgrade`.")
    return ok("migrations", f"{len(known)} applied")


async def _rights(pool: Pool, server: Any) -> Finding:
    exists, usage = (await asked(pool, "schema"))[0]
    if not exists:
        return skipped("rights", "there is no schema soma yet")
    grant = f"as the owner of the tables: `somastack db upgrade --grant-to {server['role']}`."
    if not usage:
        return fail("rights", f"{server['role']} may not use the schema soma", grant)
    lacking = [row[0] for row in await asked(pool, "rights")]
    if lacking:
        return fail(
            "rights", f"{server['role']} lacks {', '.join(lacking[:4])}{' …' if len(lacking) > 4 else ''}", grant
        )
    more = "; a superuser: applications need less" if server["superuser"] == "on" else ""
    return ok("rights", f"{server['role']} may append and read{more}")


async def _cluster(pool: Pool) -> Finding:
    if not (await asked(pool, "schema"))[0][0]:
        return skipped("history", "there is no schema soma yet")
    try:
        await asked(pool, "cluster")
        ahead = (await asked(pool, "ahead"))[0][0]
    except SomaError as error:
        return failed("history", error)
    if ahead > 1.0:
        text = f"the newest tick was made {span(ahead)} in the server's future: its clock was set back"
        return warn("history", text, "readers wait no longer than that; let the server keep time by NTP.")
    return ok("history", "of this cluster")


async def _transactions(pool: Pool, limits: Limits) -> Finding:
    rows = await asked(pool, "old_transactions", limits.old)
    if not rows:
        return ok("old transactions", f"none is open for more than {span(limits.old)}")
    first = rows[0]
    who = f"{first['program'] or 'a program'} of {first['role'] or 'somebody'}, {first['state']}"
    text = f"{len(rows)}; the oldest since {span(first['seconds'])} (pid {first['pid']}: {who})"
    cure = f"end it: SELECT pg_terminate_backend({first['pid']}); and set idle_in_transaction_session_timeout."
    held = (
        "readers of the log wait for what it wrote, and vacuum for what it sees"
        if first["writes"]
        else "vacuum waits for it"
    )
    return warn("old transactions", f"{text}: {held}", cure)


async def _prepared(pool: Pool, limits: Limits) -> Finding:
    rows = await asked(pool, "prepared", limits.old)
    if not rows:
        return ok("prepared transactions", "none is left over")
    first = rows[0]
    text = (
        f"{len(rows)}; {first['gid']} of {first['role']} since {span(first['seconds'])}: readers and vacuum wait for it"
    )
    cure = "COMMIT PREPARED or ROLLBACK PREPARED it: its coordinator does not."
    return fail("prepared transactions", text, cure)


async def _slots(pool: Pool) -> Finding:
    rows = await asked(pool, "slots")
    if not rows:
        return ok("replication slots", "none without a reader")
    told = ", ".join(f"{row['name']} holds {row['bytes'] / 2**20:.0f} MiB of WAL" for row in rows[:3])
    cure = f"start its reader, or SELECT pg_drop_replication_slot('{rows[0]['name']}')."
    if any(row["status"] in _LOST for row in rows):
        return fail("replication slots", f"{told}; what a reader needs is being removed", cure)
    return warn("replication slots", f"nobody reads {told}", cure)
