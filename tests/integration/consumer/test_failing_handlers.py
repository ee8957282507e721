"""Handlers that fail, swallow errors or meddle with the transaction: found out, and only their own key waits."""

from __future__ import annotations

import logging
from contextlib import nullcontext, suppress
from typing import Any

import pytest
from asyncpg import PostgresError

from soma_common.errors import TransactionConflict
from tests.waiting import until


async def warm(world: Any, worker: Any) -> int:
    """Full pages of small events behind it: the worker reads the next 200 at once. Its transactions until then."""
    await world.publish(100, keys=100, start=1000)
    await until(lambda: worker.stats().tally.settled == 100)
    return int(worker.stats().tally.transactions)


async def test_a_failing_event_holds_back_only_its_key_and_is_redriven_in_order(
    world: Any, apply: Any, caplog: pytest.LogCaptureFixture
) -> None:
    broken = True

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if broken and event.payload["n"] == 100:
            raise ValueError("bad luck")

    events = await world.publish(400, keys=40)
    bad = events[100]
    behind = [event.event_id for event in events[100:] if event.stream == bad.stream]
    worker = world.log_worker(handle)
    with caplog.at_level(logging.ERROR):
        async with worker:
            await world.applied(400 - len(behind))
            await until(lambda: worker.stats().tally.blocked == len(behind) - 1)
            stats = worker.stats()
            assert stats.healthy  # a dead letter is an operator's matter, not the process's
            assert {row[0] for row in await world.effects()}.isdisjoint(behind)
            letters = await world.letters()
            assert [letter.letter.event.event_id for letter in letters] == behind
            assert [letter.letter.status for letter in letters] == ["dead"] + ["blocked"] * (len(behind) - 1)
            broken = False
            assert await world.dlq.retry_event(letters[0].letter.letter_id)
            await world.applied(400)
            events += await world.publish(100, keys=40, start=400)
            await world.applied(500)
    told = [record.getMessage() for record in caplog.records if "is dead" in record.getMessage()]
    assert len(told) == 1
    assert str(bad.event_id) in told[0]
    assert str(bad.stream) in told[0]
    assert "bad luck" in told[0]
    assert {letter.letter.status for letter in await world.letters()} == {"resolved"}
    await world.check(events)


async def test_the_failing_event_is_found_in_a_handful_of_transactions(world: Any, apply: Any, settings: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 150:
            raise ValueError("bad luck")

    async with world.log_worker(handle, settings=settings(batch=200, lanes=1)) as worker:
        before = await warm(world, worker)
        await world.publish(200, keys=200)
        await until(lambda: worker.stats().tally.settled == 300)
        # All, those before it, itself; and those behind it in parts of 1, 4, 16 and 28.
        assert worker.stats().tally.transactions - before == 3 + 4
    assert await world.count() == 299


@pytest.mark.parametrize("bad", [0, 77, 199])
async def test_an_event_that_fails_only_at_commit_is_found_by_halving(world: Any, settings: Any, bad: int) -> None:
    async with world.pool.connection() as connection:
        await connection.execute(
            "CREATE TABLE good (n bigint PRIMARY KEY);"
            f"INSERT INTO good SELECT n FROM generate_series(0, 1099) n WHERE n <> {bad};"
            "ALTER TABLE effect ADD FOREIGN KEY (number) REFERENCES good DEFERRABLE INITIALLY DEFERRED"
        )
    async with world.log_worker(settings=settings(batch=200, lanes=1)) as worker:
        before = await warm(world, worker)
        await world.publish(200, keys=200)
        await until(lambda: worker.stats().tally.settled == 300)
        stats = worker.stats()
    assert stats.tally.transactions - before <= 2 * 8 + 1  # log2(200) levels
    assert await world.count() == 299


@pytest.mark.parametrize("keys", [1, 200])
async def test_a_handler_that_swallows_a_database_error_is_found(
    world: Any, apply: Any, settings: Any, keys: int
) -> None:
    """The transaction is broken from then on: the next handler fails in its stead, or COMMIT rolls back silently."""

    async def handle(event: Any, ctx: Any) -> None:
        if event.payload["n"] == 60:
            with pytest.raises(Exception, match="division"):
                await ctx.tx.execute("SELECT 1/0")
            return
        await apply(event, ctx)

    await world.publish(200, keys=keys)
    async with world.log_worker(handle, settings=settings(batch=200, lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 200)
    assert await world.count() == (60 if keys == 1 else 199)
    letter = (await world.letters())[0].letter
    assert letter.error_type == "asyncpg.exceptions.InFailedSQLTransactionError"


@pytest.mark.parametrize(
    "misdeed", ["COMMIT", "COMMIT; BEGIN", "INSERT INTO total VALUES ('x', 1); COMMIT; BEGIN", "ROLLBACK; BEGIN",
                "ROLLBACK", "SET CONSTRAINTS ALL IMMEDIATE"],
)  # fmt: skip
@pytest.mark.parametrize("swallow", [False, True])
async def test_a_handler_cannot_end_the_transaction_of_its_batch(
    world: Any, apply: Any, settings: Any, misdeed: str, swallow: bool
) -> None:
    """Else events of the batch would be known to the inbox and have no effect."""

    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        if event.payload["n"] == 20:
            with suppress(PostgresError) if swallow else nullcontext():
                await ctx.tx.execute(misdeed)

    events = await world.publish(40, keys=40)
    async with world.log_worker(handle, settings=settings(lanes=1)) as worker:
        await until(lambda: worker.stats().tally.settled == 40)
    (letter,) = await world.letters()
    assert letter.letter.event.event_id == events[20].event_id
    await world.check([event for event in events if event.payload["n"] != 20])


async def test_a_handler_may_use_savepoints_but_not_commit(world: Any, apply: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        await apply(event, ctx)
        with suppress(ZeroDivisionError):
            async with ctx.tx.transaction():
                await ctx.tx.execute("INSERT INTO total VALUES ('never', 1)")
                raise ZeroDivisionError
        if event.payload["n"] == 5:
            await ctx.tx.execute("ROLLBACK")

    await world.publish(6, keys=1)
    async with world.log_worker(handle) as worker:
        await until(lambda: worker.stats().tally.dead)
    (letter,) = await world.letters()
    assert "ended the transaction" in letter.message
    assert await world.count() == 5
    assert not await world.pool.fetch("SELECT * FROM total")


async def test_a_handlers_own_network_error_is_the_events_fault(world: Any) -> None:
    async def handle(event: Any, ctx: Any) -> None:
        raise ConnectionRefusedError("the shop's API is down")

    await world.publish(1)
    async with world.log_worker(handle) as worker:
        await until(lambda: worker.stats().tally.dead)
        assert worker.stats().away is None


async def test_a_conflict_between_transactions_is_tried_again(world: Any, apply: Any) -> None:
    tries = 0

    async def handle(event: Any, ctx: Any) -> None:
        nonlocal tries
        await apply(event, ctx)
        tries += 1
        if tries in (3, 5):
            await ctx.tx.execute("DO $$ BEGIN RAISE EXCEPTION 'x' USING ERRCODE = '40P01'; END $$")
        if tries == 9:
            raise TransactionConflict

    events = await world.publish(20)
    async with world.log_worker(handle) as worker:
        await world.applied(20)
        assert worker.stats().tally.conflicts == 3
    await world.check(events)
    assert tries > 20
    assert not await world.letters()
