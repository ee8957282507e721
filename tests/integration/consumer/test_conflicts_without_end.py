"""An event that meets another transaction whenever it is tried: it fails like any other, and holds up nobody else."""

from __future__ import annotations

from typing import Any

from soma_common.consumer.pipeline import MOST_CONFLICTS
from soma_common.consumer.retries import RetryPolicy
from soma_common.dlq.models import RedrivePolicy, Status
from soma_common.retry import Backoff
from tests.waiting import until

CLASH = """
CREATE FUNCTION clash() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'it met another one' USING ERRCODE = 'serialization_failure'; END $$;
CREATE TRIGGER clash BEFORE INSERT ON effect FOR EACH ROW WHEN (NEW.number = 7) EXECUTE FUNCTION clash();
"""
ONE_LATER_TRY = RetryPolicy(
    tries=1, backoff=Backoff(base=0.01, maximum=0.02), parked=RedrivePolicy(after=0.05, tries=1)
)


async def _run(world: Any, sql: str) -> None:
    async with world.pool.connection() as connection:
        await connection.execute(sql)


async def test_an_event_that_always_conflicts_becomes_a_letter(world: Any, settings: Any) -> None:
    """Parked after its tries in the lane, dead after its automatic ones; it is applied once the cause is gone."""
    await _run(world, CLASH)
    events = await world.publish(40)
    worker = world.log_worker(settings=settings(retry=ONE_LATER_TRY))
    async with worker:
        await world.applied(36)  # all but number 7 and what is behind it
        await until(lambda: worker.stats().tally.parked == 1, within=60, what="the event to be parked")
        await until(lambda: worker.stats().tally.dead == 1, within=60, what="the letter to die")
        assert worker.stats().tally.conflicts >= 2 * MOST_CONFLICTS
        assert worker.stats().away is None
        letters = await world.letters()
        assert [letter.letter.status for letter in letters] == [Status.DEAD, *[Status.BLOCKED] * 3]
        assert letters[0].letter.event.event_id == events[7].event_id
        assert letters[0].letter.error_type == "soma_common.errors.TransactionConflict"
        assert "it met another one" in (letters[0].letter.message or "")
        await _run(world, "DROP TRIGGER clash ON effect")
        assert await world.dlq.retry_event(letters[0].letter.letter_id)
        await world.applied(40)
    await world.check(events)


async def test_its_lane_goes_on_between_its_tries(world: Any, settings: Any) -> None:
    """One lane: what other keys publish later is applied while the event waits for its next try."""
    await _run(world, CLASH)
    retry = RetryPolicy(tries=2, backoff=Backoff(base=600.0, maximum=600.0))
    events = await world.publish(10)
    worker = world.log_worker(settings=settings(lanes=1, retry=retry))
    async with worker:
        await until(lambda: worker.stats().tally.retried == 1, within=60, what="the event to wait in its lane")
        session = worker._session
        events += await world.publish(7, start=10)
        await world.applied(16)
        assert worker._session is session, "no other key began again"
        assert worker.stats().held == 1
    assert not await world.letters()
