"""Faults of a database, seeded on a real one: doctor names each, and says what to do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest

from soma_common import Event, Soma, SomaConfig
from soma_common.deployment import DeployMode
from soma_common.testing.backends import PostgresHandle
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.postgres import PostgresServer
from tests.cli_support import somastack, told
from tests.debian_program import debian_folder
from tests.waiting import wait_until


def findings(*only: str, code: int | None = None, **env: str) -> dict[str, tuple[str, str, str]]:
    """What doctor finds, by check: level, text, cure."""
    done = somastack("doctor", "--json", "--old", "0.2", *(f"--only={area}" for area in only), **env)
    assert done.stdout, done.stderr
    found = told(done)
    assert found["exit_code"] == done.returncode
    assert code in (None, done.returncode), done.stdout
    return {each["check"]: (each["level"], each["text"], each["cure"] or "") for each in found["findings"]}


def on(dsn: str) -> dict[str, str]:
    return {"SOMASTACK_POSTGRES_DSN": dsn}


def over_kafka(dsn: str) -> dict[str, str]:
    return on(dsn) | {"SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9"}


async def execute(dsn: str, *statements: str) -> None:
    connection = await asyncpg.connect(dsn)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def named(dsn: str) -> str:
    return urlsplit(dsn).path[1:]


def with_login(dsn: str, login: str) -> str:
    parts = urlsplit(dsn)
    return urlunsplit(parts._replace(netloc=f"{login}@{parts.netloc.rpartition('@')[2]}"))


def test_a_database_in_order_has_nothing_to_be_said_of(soma_database: str) -> None:
    found = findings("database", "work", code=0, **on(soma_database))
    assert len(found) > 18
    assert {level for level, *_ in found.values()} == {"ok"}


def test_a_server_that_is_not_there() -> None:
    level, text, cure = findings("database", "work", code=2, **on("postgresql://a:b@127.0.0.1:1/d"))["reachable"]
    assert (level, "failed" in text, "SOMASTACK_POSTGRES_DSN" in cure) == ("fail", True, True)


def test_a_wrong_password_and_a_database_that_is_not_there(soma_database: str) -> None:
    level, text, cure = findings("database", **on(with_login(soma_database, "postgres:wrong")))["reachable"]
    assert (level, "password" in text, "password" in cure) == ("fail", True, True)
    level, text, cure = findings("database", **on(f"{soma_database}_none"))["reachable"]
    assert (level, "does not exist" in text, "create the database" in cure) == ("fail", True, True)


def test_missing_migrations_and_those_of_a_newer_release(soma_postgres: PostgresHandle, soma_database: str) -> None:
    name = f"soma_cli_{uuid4().hex[:12]}"
    try:
        level, text, cure = findings("database", code=2, **on(soma_postgres.sql.create_database(name)))["migrations"]
        assert (level, "are missing" in text, "somastack db upgrade" in cure) == ("fail", True, True)
    finally:
        soma_postgres.sql.drop_database(name)
    asyncio.run(execute(soma_database, "INSERT INTO soma.migrations VALUES (9999, 'later', 'x')"))
    level, text, cure = findings("database", **on(soma_database))["migrations"]
    assert (level, "9999" in text, "newer" in cure) == ("fail", True, True)


def test_a_role_without_rights(soma_database: str) -> None:
    role = f"cli_{uuid4().hex[:12]}"
    asyncio.run(execute(soma_database, f"CREATE ROLE {role} LOGIN PASSWORD 'p'"))
    try:
        as_role = with_login(soma_database, f"{role}:p")
        level, text, cure = findings("database", code=2, **on(as_role))["rights"]
        assert (level, "may not use the schema" in text, f"--grant-to {role}" in cure) == ("fail", True, True)
        asyncio.run(
            execute(
                soma_database,
                f"GRANT USAGE ON SCHEMA soma TO {role}",
                f"GRANT SELECT ON ALL TABLES IN SCHEMA soma TO {role}",
            )
        )
        level, text, _ = findings("database", **on(as_role))["rights"]
        assert (level, "INSERT on soma.events" in text) == ("fail", True)
        assert somastack("db", "upgrade", "--grant-to", role, **on(soma_database)).returncode == 0
        assert findings("database", **on(as_role))["rights"][0] == "ok"
    finally:
        asyncio.run(execute(soma_database, f"DROP OWNED BY {role}", f"DROP ROLE {role}"))


@pytest.mark.parametrize(
    ("setting", "value", "check", "level"),
    [
        ("synchronous_commit", "off", "synchronous commit", "warn"),
        ("default_transaction_isolation", "serializable", "isolation", "warn"),
        ("default_transaction_read_only", "on", "read only", "fail"),
        ("timezone", "Europe/Rome", "time zone", "warn"),
    ],
)
def test_settings_that_break_promises(setting: str, value: str, check: str, level: str, soma_database: str) -> None:
    asyncio.run(execute(soma_database, f"ALTER DATABASE {named(soma_database)} SET {setting} = '{value}'"))
    found = findings("database", **on(soma_database))
    assert found[check][0] == level
    assert setting.lower() in found[check][2].lower()


async def test_a_transaction_that_nobody_ends(soma_database: str) -> None:
    idle = await asyncpg.connect(soma_database, server_settings={"application_name": "forgetful"})
    try:
        await idle.execute("BEGIN; INSERT INTO soma.idempotency_keys VALUES ('t', 'k', gen_random_uuid(), now())")
        await asyncio.sleep(0.3)
        found = await asyncio.to_thread(findings, "database", code=1, **on(soma_database))
        level, text, cure = found["old transactions"]
        assert (level, "forgetful" in text, "idle in transaction" in text) == ("warn", True, True)
        assert f"pg_terminate_backend({idle.get_server_pid()})" in cure
    finally:
        await idle.close()


async def test_a_prepared_transaction_that_was_left_over(soma_database: str) -> None:
    await execute(soma_database, "BEGIN; CREATE TABLE left_over (x int); PREPARE TRANSACTION 'of nobody'")
    try:
        await asyncio.sleep(0.3)
        level, text, cure = (await asyncio.to_thread(findings, "database", code=2, **on(soma_database)))[
            "prepared transactions"
        ]
        assert (level, "of nobody" in text, "ROLLBACK PREPARED" in cure) == ("fail", True, True)
    finally:
        await execute(soma_database, "ROLLBACK PREPARED 'of nobody'")


def test_a_replication_slot_that_nobody_reads(soma_database: str) -> None:
    slot = f"cli_{uuid4().hex[:8]}"
    asyncio.run(execute(soma_database, f"SELECT pg_create_physical_replication_slot('{slot}', true)"))
    try:
        level, text, cure = findings("database", code=1, **on(soma_database))["replication slots"]
        assert (level, slot in text, f"pg_drop_replication_slot('{slot}')" in cure) == ("warn", True, True)
    finally:
        asyncio.run(execute(soma_database, f"SELECT pg_drop_replication_slot('{slot}')"))


def test_a_database_of_another_cluster_and_a_clock_that_was_set_back(soma_database: str) -> None:
    asyncio.run(execute(soma_database, "INSERT INTO soma.ticks SELECT tick_id + 1, token, snapshot, position_before, position_after, era, "
                                       "era_start, clock_timestamp() + interval '1 hour' FROM soma.ticks"))  # fmt: skip
    assert findings("database", **on(soma_database))["history"][0] == "warn"
    asyncio.run(execute(soma_database, "UPDATE soma.cluster SET system_identifier = 7"))
    level, _, cure = findings("database", code=2, **on(soma_database))["history"]
    assert (level, "somastack db repair" in cure) == ("fail", True)


def test_a_pooler_that_is_not_there(soma_database: str) -> None:
    found = findings("database", code=1, SOMASTACK_POSTGRES_POOLER="transaction", **on(soma_database))
    assert found["pooler"][0] == "warn"


@contextmanager
def pooler(dsn: str, folder: Path) -> Iterator[str]:
    """A real PgBouncer before a database; its address."""
    root, port, parts = debian_folder("pgbouncer", "libc-ares2"), free_port(), urlsplit(dsn)
    folder.chmod(0o755)
    (folder / "users").write_text(f'"{parts.username}" "{parts.password}"\n')
    (folder / "ini").write_text(
        f"[databases]\n{parts.path[1:]} = host={parts.hostname} port={parts.port}\n[pgbouncer]\nlisten_addr = {LOOPBACK}\n"
        f"listen_port = {port}\nauth_type = plain\nauth_file = {folder}/users\npool_mode = transaction\nunix_socket_dir =\n"
        "ignore_startup_parameters = extra_float_digits\n"
    )
    env = os.environ | {"LD_LIBRARY_PATH": ":".join(map(str, {path.parent for path in root.rglob("*.so*")}))}
    account = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
    reached = [root.parent, *root.parents]
    if os.geteuid() == 0 and any(not place.stat().st_mode & 1 for place in reached):
        program = folder / "pgbouncer"  # the account may not enter root's home
        program.write_bytes((root / "usr/sbin/pgbouncer").read_bytes())
        program.chmod(0o755)
        for library in [path for path in root.rglob("*.so*") if path.is_file()]:
            (folder / library.name).write_bytes(library.read_bytes())
        for link in [path for path in root.rglob("*.so*") if path.is_symlink()]:
            (folder / link.name).write_bytes(link.resolve().read_bytes())
        env["LD_LIBRARY_PATH"] = str(folder)
    else:
        program = root / "usr/sbin/pgbouncer"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, str(folder / "ini")], env=env, stdout=log, stderr=log, **account)
    try:
        address = dsn.replace(f":{parts.port}/", f":{port}/")
        wait_until(lambda: "listening on" in (folder / "log").read_text(), what="PgBouncer")
        yield address
    finally:
        process.kill()
        process.wait()


def test_a_pooler_that_the_settings_do_not_know_of(
    soma_database: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = Path(f"/tmp/soma-pgbouncer-{uuid4().hex[:8]}")
    folder.mkdir()
    try:
        with pooler(soma_database, folder) as address:
            level, _, cure = findings("database", **on(address))["pooler"]
            assert (level, "SOMASTACK_POSTGRES_POOLER=transaction" in cure) == ("fail", True)
            found = findings("database", SOMASTACK_POSTGRES_POOLER="transaction", **on(address))
            assert found["pooler"][0] == "ok", found
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def test_a_standby(tmp_path: Path) -> None:
    with PostgresServer.start(parent=_open(tmp_path)) as primary:
        assert somastack("db", "upgrade", **on(primary.dsn)).returncode == 0
        with primary.standby() as standby:
            standby.catch_up(primary)
            found = findings("database", code=2, **on(standby.dsn))
            assert (found["primary"][0], found["migrations"][0]) == ("fail", "ok")
            done = somastack("status", "--json", **on(standby.dsn))
            assert done.returncode == 1
            assert "standby" in done.stdout


def _open(folder: Path) -> Path:
    """PostgreSQL does not run as root: its account must get here."""
    for place in (folder, *folder.parents):
        if place == Path("/tmp"):
            break
        place.chmod(0o755)
    return folder


async def test_events_that_no_relay_sends(soma_database: str) -> None:
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, service_id="shop", postgres_dsn=soma_database, kafka_bootstrap="127.0.0.1:9"
    )
    assert (await asyncio.to_thread(findings, "work", **over_kafka(soma_database)))["relay"][0] == "ok"
    from soma_common.events.payloads import PayloadModels
    from soma_common.wiring import open_ground

    ground = await open_ground(config, PayloadModels(), lambda _: "soma.shop.events")
    try:
        await ground.store.publish(Event(event_type="order.placed", payload={}, tenant_id="acme", aggregate_id="o-1"))
    finally:
        await ground.close()
    await asyncio.sleep(0.3)
    level, text, cure = (await asyncio.to_thread(findings, "work", **over_kafka(soma_database)))["relay"]
    assert (level, "1 events wait" in text, "somastack relay" in cure) == ("fail", True, True)


async def test_dead_letters_a_silent_consumer_and_a_lease_of_days(soma_database: str) -> None:
    soma = Soma(SomaConfig(service_id="shop", postgres_dsn=soma_database))

    @soma.handler("order.placed", consumer="billing")
    async def bill(event: object, ctx: object) -> None:
        raise ValueError("no such price")

    async with soma:
        await soma.publish(Event(event_type="order.placed", payload={}, tenant_id="acme", aggregate_id="o-1"))
        async with soma.consumer("billing"):
            deadline = time.monotonic() + 60
            while not (await soma.pool.fetch("SELECT count(*) FROM soma.dead_letters"))[0][0]:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        await soma.publish(Event(event_type="order.seen", payload={}, tenant_id="acme", aggregate_id="o-2"))
    await asyncio.sleep(0.3)
    found = await asyncio.to_thread(findings, "work", code=1, **on(soma_database))
    assert (found["dead letters"][0], "somastack dlq" in found["dead letters"][2]) == ("warn", True)
    assert (found["consumers of the log"][0], "billing" in found["consumers of the log"][1]) == ("warn", True)
    await execute(
        soma_database, f"UPDATE soma.shards SET owner = 'x', leased_until = now() + interval '{timedelta(days=3)}'"
    )
    found = await asyncio.to_thread(findings, "work", code=1, **on(soma_database))
    assert (found["leases"][0], "set back" in found["leases"][1]) == ("warn", True)


@pytest.mark.parametrize(("offset", "level"), [("+5m", "fail"), ("-10s", "warn"), ("+0.2s", "ok")])
def test_clocks_that_differ(offset: str, level: str, soma_database: str) -> None:
    library = next(debian_folder("libfaketime").rglob("libfaketime.so.1"))
    moved = {"LD_PRELOAD": str(library), "FAKETIME": offset, "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    assert findings("database", **moved, **on(soma_database))["clock"][0] == level
