"""The plan of kills, and a process that does not do what it should."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from examples.flights.chaos import HOLDS, Child, Kill, ProcessFailed, plans
from examples.flights.stages import Stage


def test_the_same_seed_gives_the_same_kills() -> None:
    assert list(plans("consumer", 20, 1000, 7)) == list(plans("consumer", 20, 1000, 7))
    assert list(plans("consumer", 20, 1000, 7)) != list(plans("consumer", 20, 1000, 8))
    assert list(plans("consumer", 20, 1000, 7)) != list(plans("relay", 20, 1000, 7))


@pytest.mark.parametrize("kind", sorted(HOLDS))
@pytest.mark.parametrize("share", [1, 2, 1000])
def test_kills_come_within_their_share_and_the_first_at_the_point_between_two_commits(kind: str, share: int) -> None:
    schedule = list(plans(kind, 50, share, 0))
    assert len(schedule) == 50
    assert schedule[0].hold == {"consumer": Stage.COMMITTED, "relay": Stage.ACKNOWLEDGED}[kind]
    assert all(1 <= plan.steps <= max(1, share // 2) for plan in schedule)
    assert any(plan.hold is None for plan in schedule)


def test_only_a_held_relay_is_surely_before_its_cursor() -> None:
    assert Kill("relay", 1, 1, Stage.ACKNOWLEDGED, True, 5).where == "between acknowledgement and cursor"
    assert Kill("relay", 1, 1, Stage.ACKNOWLEDGED, False, 5).where == "after an acknowledgement"


async def test_a_process_that_ends_by_itself_is_told_with_its_log(tmp_path: Path) -> None:
    child = Child("consumer", tmp_path, {**os.environ, "SOMA_DEPLOY_MODE": "nonsense"})
    child.check()  # not started is not a failure
    await child.start()
    with pytest.raises(ProcessFailed, match=r"(?s)ended by itself with exit code 1.*Unknown deployment mode"):
        async with asyncio.timeout(60):
            while True:
                child.check()
                await asyncio.sleep(0.02)
    await child.kill()  # of the dead: nothing
