"""Tens of thousands of letters: asked for with care, resumed after a kill, left alone when the cause is not mended."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

import pytest
from click.testing import CliRunner

from soma_common.cli.dlq import dlq
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.careful import Redrive, RedriveRules
from soma_common.errors import RedriveStopped, ValidationError
from soma_common.events.store import ALL_TENANTS
from tests.integration.consumer.conftest import AT_ONCE
from tests.waiting import until

# Letters like a first one, each of another event, spread over sequences; written as a set.
CLONE = """
WITH first AS MATERIALIZED (SELECT * FROM soma.dead_letters LIMIT 1),
     made AS MATERIALIZED (SELECT n, gen_random_uuid() AS id, 'b' || n % $2::int AS key FROM generate_series(1, $1::int) n),
     written AS (
         INSERT INTO soma.dead_letters (
             letter_id, consumer_id, sequence, status, stage, topic, partition, record_offset, record_key, value,
             header_names, header_values, record_time, digest, event_id, event_type, tenant_id, service_id,
             idempotency_key, trace_id, error_type, error_message, fingerprint, attempts, automatic_left, parked_at,
             changed_at)
         SELECT gen_random_uuid(), f.consumer_id, 'k'::bytea || convert_to(m.key, 'UTF8'), 'dead', f.stage, f.topic,
                f.partition, 1000000 + m.n, convert_to(m.key, 'UTF8'),
                convert_to(replace(convert_from(f.value, 'UTF8'), f.event_id::text, m.id::text), 'UTF8'), f.header_names,
                f.header_values, f.record_time, sha256(convert_to(m.id::text, 'UTF8')), m.id, f.event_type, f.tenant_id,
                f.service_id, m.id::text, f.trace_id, f.error_type, f.error_message, f.fingerprint, 1, 0, now(), now()
         FROM made m CROSS JOIN first f ORDER BY m.n
     )
INSERT INTO soma.dead_sequences (consumer_id, sequence, opened_at)
SELECT DISTINCT f.consumer_id, 'k'::bytea || convert_to(m.key, 'UTF8'), now() FROM made m CROSS JOIN first f
"""
SETTINGS = ConsumerSettings(retry=AT_ONCE, redrives=6, redrive_every=0.05)
OF_BILLING: dict[str, Any] = {"tenant_id": ALL_TENANTS, "consumer": "billing"}


class Cause:
    """Why the handler fails."""

    def __init__(self) -> None:
        self.mended, self.every = False, 1
        self.seen = 0

    async def handle(self, event: Any, ctx: Any) -> None:
        self.seen += 1
        if not self.mended and self.seen % self.every == 0:
            raise ValueError("the table is missing")
        await ctx.tx.execute("INSERT INTO effect (event_id, number) VALUES ($1, 1)", event.event_id)


@pytest.fixture
def cause() -> Cause:
    return Cause()


async def many(world: Any, count: int, sequences: int) -> None:
    """So many dead letters, of which the first came about by itself."""
    refusing = Cause()
    async with world.log_worker(refusing.handle, settings=SETTINGS) as worker:
        await world.publish(1)
        await until(lambda: worker.stats().tally.dead == 1, within=90)
    await world.pool.fetch(CLONE, count - 1, sequences)
    await world.pool.fetch("ANALYZE soma.dead_letters, soma.dead_sequences")


async def statuses(world: Any) -> dict[str, int]:
    rows = await world.pool.fetch("SELECT status, count(*) FROM soma.dead_letters GROUP BY status")
    return {row[0]: row[1] for row in rows}


@pytest.mark.timeout(600)
async def test_ten_thousand_letters(world: Any, cause: Cause) -> None:
    await many(world, 10_000, 250)
    cause.mended = True
    most_waiting, states = 0, 0
    async with world.log_worker(cause.handle, settings=SETTINGS) as worker:
        state = Redrive()
        async for state in world.dlq.redrive(rules=RedriveRules(ahead=400, wait=True, patience=60), **OF_BILLING):
            most_waiting, states = max(most_waiting, state.waiting), states + 1
        assert (state.marked, state.stopped, state.failed) == (10_000, None, 0)
        assert (state.resolved, state.waiting) == (10_000, 0)
        assert most_waiting <= 400 + 10 * 40
        assert states > 20
        await until(lambda: worker.stats().tally.redriven == 10_000, within=120)
    assert await statuses(world) == {"resolved": 10_000}
    assert len({row[0] for row in await world.effects()}) == len(await world.effects()) == 10_000
    assert await world.pool.fetch("SELECT FROM soma.dead_sequences") == []


async def test_it_stops_when_the_cause_is_not_mended(world: Any, cause: Cause) -> None:
    await many(world, 20_000, 20_000)
    async with world.log_worker(cause.handle, settings=SETTINGS):
        with pytest.raises(RedriveStopped, match="50 of the last 50 letters failed again") as refused:
            await world.dlq.retry_many(rules=RedriveRules(ahead=100), **OF_BILLING)
        (fingerprint,) = {
            row[0] for row in await world.pool.fetch("SELECT DISTINCT fingerprint FROM soma.dead_letters")
        }
        assert fingerprint in (refused.value.cure or "")
        told = await world.pool.fetch(
            "SELECT count(DISTINCT letter_id) FROM soma.dead_letter_history WHERE what = 'redriving'"
        )
        assert 50 <= told[0][0] <= 1000  # the rest was left alone
        cause.mended = True
        before = (await statuses(world))["dead"]
        assert before > 18_000
        # Asked again, a few, past those that failed.
        assert await world.dlq.retry_many(most=300, rules=RedriveRules(ahead=100), **OF_BILLING) >= 300


async def test_it_goes_on_while_few_fail(world: Any, cause: Cause) -> None:
    await many(world, 2_000, 2_000)
    cause.every = 5
    async with world.log_worker(cause.handle, settings=SETTINGS):
        rules = RedriveRules(window=50, failures=0.5, wait=True)
        states = [state async for state in world.dlq.redrive(rules=rules, **OF_BILLING)]
    last = states[-1]
    assert (last.stopped, last.waiting, last.marked) == (None, 0, 2_000)
    assert last.resolved + last.failed == 2_000
    assert 300 <= last.failed <= 500


async def test_a_rate_is_kept(world: Any, cause: Cause) -> None:
    await many(world, 200, 200)
    cause.mended = True
    async with world.log_worker(cause.handle, settings=SETTINGS):
        began = time.monotonic()
        assert await world.dlq.retry_many(rules=RedriveRules(rate=40.0), **OF_BILLING) == 200
        assert time.monotonic() - began > 3.5  # 200 at 40 per second, but for the first burst


async def test_nobody_tries_them(world: Any) -> None:
    await many(world, 300, 300)
    with pytest.raises(RedriveStopped, match="is the consumer running") as refused:
        await world.dlq.retry_many(rules=RedriveRules(ahead=100, patience=0.5), **OF_BILLING)
    assert "after 100 letters" in refused.value.message


async def test_a_sequence_that_fails_does_not_hold_up_the_others(world: Any, cause: Cause) -> None:
    """Its later letters stay where they are, and are not waited for."""
    await many(world, 1_000, 10)

    async def handle(event: Any, ctx: Any) -> None:
        if event.event_id in bad:
            raise ValueError("this one stays bad")
        await ctx.tx.execute("INSERT INTO effect (event_id, number) VALUES ($1, 1)", event.event_id)

    rows = await world.pool.fetch(
        "SELECT event_id FROM soma.dead_letters WHERE record_key = 'b3' ORDER BY place LIMIT 1"
    )
    bad = {row[0] for row in rows}
    async with world.log_worker(handle, settings=SETTINGS):
        rules = RedriveRules(ahead=50, wait=True, patience=30)
        states = [state async for state in world.dlq.redrive(rules=rules, **OF_BILLING)]
    assert (states[-1].stopped, states[-1].failed) == (None, 1)
    assert await statuses(world) == {"resolved": 900, "dead": 1, "redriving": 99}


def command(world: Any, *arguments: str) -> tuple[list[str], dict[str, str]]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "SOMA_DEPLOY_MODE": "standalone",
           "SOMASTACK_POSTGRES_DSN": world.dsn}  # fmt: skip
    return [sys.executable, "-m", "soma_common.cli.main", "dlq", "retry-all", "--all-tenants", *arguments], env


async def test_a_killed_re_drive_goes_on(world: Any, cause: Cause) -> None:
    await many(world, 3_000, 300)
    cause.mended = True
    call, env = command(world, "--consumer", "billing", "--rate", "600")
    async with world.log_worker(cause.handle, settings=SETTINGS):
        for turn in range(1, 4):
            process = await asyncio.create_subprocess_exec(
                *call, env=env, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )

            async def some(least: int = turn * 300) -> bool:
                return (await statuses(world)).get("resolved", 0) >= least

            await until(some, within=90)
            process.kill()
            await process.wait()
        done = await asyncio.to_thread(
            subprocess.run, [*call, "--wait"], env=env, capture_output=True, text=True, timeout=170, check=False
        )
    assert done.returncode == 0, done.stderr
    assert await statuses(world) == {"resolved": 3_000}
    sql = "SELECT count(*) FROM soma.dead_letter_history WHERE what = 'redriving' GROUP BY letter_id"
    assert {row[0] for row in await world.pool.fetch(sql)} == {1}  # what was asked for stayed so


async def test_the_command_stops_with_an_exit_code_of_its_own(world: Any, cause: Cause) -> None:
    await many(world, 500, 500)
    call, env = command(world, "--consumer", "billing", "--window", "20", "--ahead", "60")
    async with world.log_worker(cause.handle, settings=SETTINGS):
        done = await asyncio.to_thread(
            subprocess.run, call, env=env, capture_output=True, text=True, timeout=170, check=False
        )
        assert done.returncode == 3, done.stderr
        assert "stopped: 20 of the last 20 letters failed again" in done.stderr
        assert "--fingerprint" in done.stderr
        cursor = done.stderr.split("--after ")[1].split(";")[0]
        told = await asyncio.to_thread(
            subprocess.run, [*call, "--json", "--after", cursor], env=env, capture_output=True, text=True, timeout=170
        )
        assert told.returncode == 3, told.stderr
        state = json.loads(told.stdout)
        assert state["letters"] >= 20
        assert state["failed"] >= 20
        assert state["resolved"] == 0
        assert int(state["cursor"]) > int(cursor)
        assert told.stderr == ""


async def test_the_command_says_in_the_end_what_became_of_the_letters(world: Any, cause: Cause) -> None:
    """Few enough failed for it to end well; but they did."""
    await many(world, 5, 5)
    call, env = command(world, "--consumer", "billing", "--wait")
    async with world.log_worker(cause.handle, settings=SETTINGS):
        done = await asyncio.to_thread(
            subprocess.run, call, env=env, capture_output=True, text=True, timeout=170, check=False
        )
    assert done.returncode == 0, done.stderr
    assert "0 resolved, 5 failed, 0 under way" in done.stdout


@pytest.mark.parametrize(
    "given",
    [{"rate": 0.0}, {"rate": float("nan")}, {"window": 0}, {"failures": -1.0}, {"ahead": 0}, {"patience": 0.0}],
)
def test_rules_that_cannot_be_followed(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="cannot be followed"):
        RedriveRules(**given)


@pytest.mark.parametrize("option", ["--rate=0", "--rate=x", "--window=0", "--failures=0", "--ahead=0", "--patience=-1"])
def test_options_that_cannot_be_followed(option: str) -> None:
    done = CliRunner().invoke(dlq, ["retry-all", "--all-tenants", option])
    assert done.exit_code == 2
    assert option.partition("=")[0] in done.output


def test_a_cursor_that_is_none(world: Any) -> None:
    env = {"SOMA_DEPLOY_MODE": "standalone", "SOMASTACK_POSTGRES_DSN": world.dsn}
    done = CliRunner().invoke(dlq, ["retry-all", "--all-tenants", "--after", "1; DROP"], env=env)
    assert done.exit_code == 2
    assert "next_cursor" in done.output
