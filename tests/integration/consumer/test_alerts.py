"""The hook on_dead_letter: told after the commit, whatever it does the consumer goes on."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from contextlib import suppress
from typing import Any

import pytest

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.alerts import Alerts
from soma_common.dlq.failures import Failure, Stage
from soma_common.dlq.models import Known, LetterNotice, RawRecord, RedrivePolicy, Status
from soma_common.errors import ConfigurationError
from soma_common.log.source import LogSettings, LogSource
from soma_common.postgres.pool import Pool
from soma_common.testing.proxy import CommitCut, proxy_to
from tests.waiting import until

PATIENCE = 90.0
AT_ONCE = RetryPolicy(tries=1, parked=RedrivePolicy(tries=0))


async def refuse(event: Any, ctx: Any) -> None:
    if event.payload["n"] % 2:
        raise ValueError(f"odd: {event.payload['n']}")


def given(hook: Any, **others: Any) -> ConsumerSettings:
    return ConsumerSettings(**({"retry": AT_ONCE, "redrive_every": 0.05, "on_dead_letter": hook} | others))


async def test_a_coroutine_function_is_told_of_every_letter(world: Any) -> None:
    told: list[tuple[LetterNotice, str]] = []

    async def hook(notice: LetterNotice) -> None:
        sql = "SELECT status FROM soma.dead_letters WHERE record_offset = $1"
        told.append((notice, (await world.pool.fetch(sql, notice.record.offset))[0][0]))

    async with world.log_worker(refuse, settings=given(hook)) as worker:
        await world.publish(10)
        await until(lambda: worker.stats().tally.alerts == 5, within=PATIENCE)
    assert len(told) == 5
    notice, stored = told[0]
    assert (notice.consumer, notice.status, stored) == ("billing", Status.DEAD, "dead")
    assert {n.failure.message for n, _ in told} == {f"odd: {n}" for n in (1, 3, 5, 7, 9)}
    assert notice.event.tenant_id == "acme"
    assert {n.record.offset for n, _ in told} == {e.record.offset for e in await world.letters()}


async def test_a_retrying_letter_is_told_again_when_it_dies(world: Any) -> None:
    told: list[tuple[str, int]] = []
    retry = RetryPolicy(tries=1, parked=RedrivePolicy(after=0.05, tries=1))
    settings = given(lambda notice: told.append((notice.status.value, notice.attempts)), retry=retry)
    async with world.log_worker(refuse, settings=settings):
        await world.publish(1, start=1)
        await until(lambda: len(told) == 2, within=PATIENCE)
    assert told == [("retrying", 1), ("dead", 2)]


@pytest.mark.parametrize("kind", ["raises", "exits", "hangs", "swallows", "sleeps"])
async def test_a_bad_hook_keeps_nothing_waiting(world: Any, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    over = threading.Event()

    async def hangs(notice: LetterNotice) -> None:
        await asyncio.Event().wait()

    async def swallows(notice: LetterNotice) -> None:
        while not over.is_set():
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.05)

    def raises(notice: LetterNotice) -> None:
        raise OSError("the pager is out of order")

    def exits(notice: LetterNotice) -> None:
        raise SystemExit(3)

    hooks = {"hangs": hangs, "swallows": swallows, "raises": raises, "exits": exits, "sleeps": lambda _: over.wait(60)}
    worker = world.log_worker(refuse, settings=given(hooks[kind]))
    worker._alerts._timeout = 0.3
    try:
        with caplog.at_level(logging.ERROR):
            async with worker:
                await world.publish(40)
                await until(lambda: worker.stats().tally.settled == 40, within=PATIENCE)
                await until(lambda: worker.stats().tally.alerts_lost >= 3, within=PATIENCE)
    finally:
        over.set()
    assert worker.stats().tally.dead + worker.stats().tally.blocked == 20
    assert worker.stats().tally.alerts_lost == worker.stats().tally.dead
    assert any("on_dead_letter was not told" in record.getMessage() for record in caplog.records)


async def test_a_full_queue_is_said_and_counted(world: Any) -> None:
    going = asyncio.Event()

    async def slow(notice: LetterNotice) -> None:
        await going.wait()

    alerts = Alerts(slow, world.pool, most=3)
    for number in range(10):
        alerts.tell(notice_at(number))
    assert alerts.lost == 7
    going.set()
    await alerts.stop()
    assert (alerts.told, alerts.lost) == (3, 7)


async def test_a_stop_does_not_wait_long_for_a_hook(world: Any) -> None:
    async def never(notice: LetterNotice) -> None:
        await asyncio.Event().wait()

    alerts = Alerts(never, world.pool, timeout=60.0)
    for number in range(4):
        alerts.tell(notice_at(number))
    began = time.monotonic()
    await alerts.stop(0.2)
    assert time.monotonic() - began < 10
    assert alerts.lost >= 3


async def test_a_letter_whose_commit_was_not_answered_is_told(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    told: set[int] = set()
    doubts: list[int] = []
    with proxy_to(world.dsn) as proxy:
        async with Pool(proxy.through(world.dsn)) as pool:
            source = LogSource(pool, "billing", LogSettings(most_idle=0.02, lease=60.0))
            settings = given(lambda notice: told.add(notice.record.offset), save_every=30, redrives=0)
            worker = world.worker(source, refuse, settings=settings)
            worker._pool = worker._alerts._pool = pool
            tell = worker._alerts.tell

            def watched(notice: LetterNotice, *, doubtful: bool = False) -> None:
                doubts.extend([notice.record.offset] * doubtful)
                tell(notice, doubtful=doubtful)

            monkeypatch.setattr(worker._alerts, "tell", watched)
            async with worker:
                for number in range(1, 41, 2):  # other commits may come first: until one of a letter was cut
                    await until(lambda: worker.stats().ready, within=PATIENCE)
                    proxy.cut_at_commit(CommitCut.AFTER)
                    await world.publish(1, start=number, keys=1000)

                    async def there(count: int = number // 2 + 1) -> bool:
                        return len(await world.letters()) == count

                    await until(there, within=PATIENCE)
                    if doubts:
                        break
                written = {letter.record.offset for letter in await world.letters()}
                assert doubts
                assert set(doubts) <= written
                await until(lambda: told == written, within=PATIENCE)


async def test_a_doubtful_letter_that_was_not_written_is_not_told(world: Any) -> None:
    told: list[LetterNotice] = []
    alerts = Alerts(told.append, world.pool)
    alerts.tell(notice_at(1), doubtful=True)
    await alerts.stop()
    assert told == []
    assert alerts.lost == 0


def test_something_that_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="on_dead_letter"):
        ConsumerSettings(on_dead_letter="mail@example.org")  # type: ignore[arg-type]


def notice_at(offset: int) -> LetterNotice:
    failure = Failure.of(Stage.HANDLE, ValueError("no"))
    record = RawRecord(topic="t", partition=0, offset=offset)
    return LetterNotice(
        consumer="billing", status=Status.DEAD, record=record, event=Known(), failure=failure, attempts=1
    )


async def test_an_alert_that_is_under_way_when_the_consumer_stops_is_counted(
    world: Any, caplog: pytest.LogCaptureFixture
) -> None:
    began = asyncio.Event()

    async def hook(notice: LetterNotice) -> None:
        began.set()
        await asyncio.Event().wait()

    alerts = Alerts(hook, world.pool)
    alerts.tell(notice_at(1))
    await began.wait()
    await alerts.stop(patience=0.0)
    assert (alerts.told, alerts.lost) == (0, 1)
    assert "the consumer stops" in caplog.text
