"""Progress where there is no terminal: a line now and then, also while a step takes long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import click
import pytest

from soma_common.cli import show
from soma_common.events.store import ALL_TENANTS
from soma_common.postgres.cursor import BEGINNING
from soma_common.replay.models import Counts, Progress, ReplayFilter, ReplayMode, ReplayState, Scope
from tests.waiting import until

RUN = Progress(
    run_id=UUID(int=1), consumer="billing", mode=ReplayMode.MISSING, source="log",
    wanted=ReplayFilter(tenant_id=ALL_TENANTS), state=ReplayState.RUNNING, inbox_id=1, epoch=1,
    scope=Scope(consumer_id=1, end_tick=1, end_token=1, first_position=1, last_position=100), cursor=BEGINNING,
    counts=Counts(), rate=None, requested_by="", reason="", error=None, created_at=datetime.now(UTC), started_at=None,
    ended_at=None,
)  # fmt: skip


class Lines:
    """What was told so far."""

    def __init__(self, captured: pytest.CaptureFixture[str]) -> None:
        self._captured, self._told = captured, ""

    def __call__(self) -> list[str]:
        self._told += self._captured.readouterr().out
        return self._told.splitlines()


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Lines:
    monkeypatch.setattr(show, "_EVERY", 0.02)
    return Lines(capsys)


async def test_a_slow_step_is_not_silent(lines: Lines) -> None:
    one = replace(RUN, counts=Counts(read=7))

    async def steps() -> AsyncIterator[Progress]:
        await until(lambda: len(lines()) >= 2, within=10, what="lines before the first step")
        yield one
        await until(lambda: sum("7 read" in line for line in lines()) >= 2, within=10, what="lines within a step")
        yield replace(one, state=ReplayState.DONE)

    await show.watch(steps(), last=RUN, json=False)
    assert lines()[0].startswith("running 0%: 0 read")
    assert lines()[-1].startswith("done 100%: 7 read")
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nobody goes on telling"


async def test_a_run_that_fails_ends_the_telling(lines: Lines) -> None:
    async def steps() -> AsyncIterator[Progress]:
        yield RUN
        raise ValueError("bad luck")

    with pytest.raises(ValueError, match="bad luck"):
        await show.watch(steps(), last=RUN, json=True)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def test_a_reader_that_is_gone_ends_the_command(lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in ``| head``: the run can be taken up again."""
    broken = asyncio.Event()

    def echo(*_: Any, **__: Any) -> None:
        broken.set()
        raise BrokenPipeError

    monkeypatch.setattr(click, "echo", echo)
    seen = 0

    async def steps() -> AsyncIterator[Progress]:
        nonlocal seen
        await broken.wait()
        while True:
            await asyncio.sleep(0)
            seen += 1
            yield RUN

    with pytest.raises(BrokenPipeError):
        await asyncio.wait_for(show.watch(steps(), last=RUN, json=False), 30)
    assert seen == 1
