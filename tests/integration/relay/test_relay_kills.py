"""Relay processes that are killed, frozen and ended while events flow."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest

from tests.integration.relay.lab import RelayProcess, World, check, owners
from tests.waiting import until

Spawn = Callable[..., RelayProcess]
MODES = pytest.mark.parametrize("mode", ["--at-least-once", "--exactly-once"])
ROWS = ("--rows", "200")
# One round at most is acknowledged and not saved, and the next may be on its way.
IN_FLIGHT = 2 * 200


async def _relaying(lab: World) -> bool:
    return len(await owners(lab)) == 8


@MODES
async def test_sigkill_in_mid_flight(lab: World, spawn: Spawn, mode: str) -> None:
    kills = 4
    async with lab.writing():
        for _ in range(kills):
            process = spawn(lab, mode, *ROWS)
            await until(lambda: _relaying(lab), what="the relay owns all groups")
            await _progress(lab)
            assert process.process.poll() is None, process.output()
            process.kill()
        last = spawn(lab, mode, *ROWS)
        await until(lambda: _relaying(lab), what="the relay owns all groups")
    await lab.arrived()
    assert await last.terminated() == 0, last.output()
    duplicates = check(lab.journal, await lab.arrived())
    assert duplicates <= (0 if mode == "--exactly-once" else kills * IN_FLIGHT)


@MODES
async def test_a_zombie_that_wakes_past_its_lease(lab: World, spawn: Spawn, mode: str) -> None:
    async with lab.writing():
        zombie = spawn(lab, mode, *ROWS)
        await until(lambda: _relaying(lab), what="the relay owns all groups")
        before = set((await owners(lab)).values())
        await _progress(lab)
        zombie.signal(signal.SIGSTOP)
        spawn(lab, mode, *ROWS)
        await until(lambda: _other_owner(lab, before), what="a takeover")
        await _progress(lab)
        zombie.signal(signal.SIGCONT)
        await until(lambda: _owners(lab, 2), what="the zombie is a worker like any other again")
        await _progress(lab)
    await lab.arrived()
    assert await zombie.terminated() == 0, zombie.output()
    duplicates = check(lab.journal, await lab.arrived())
    assert duplicates <= (0 if mode == "--exactly-once" else IN_FLIGHT)


@MODES
async def test_takeover_takes_less_than_twice_the_lease(lab: World, spawn: Spawn, mode: str) -> None:
    lease = 5.0  # long beside what a busy machine adds
    victim = spawn(lab, mode, lease=lease)
    await until(lambda: _relaying(lab), what="the relay owns all groups")
    spawn(lab, mode, lease=lease)
    await until(lambda: _owners(lab, 2), what="two workers share")
    victim.kill()
    killed = time.monotonic()
    await lab.write(80, keys=40)
    await lab.arrived(within=2 * lease)
    assert time.monotonic() - killed < 2 * lease
    check(lab.journal, await lab.arrived())


@MODES
async def test_sigterm_drains(lab: World, spawn: Spawn, mode: str) -> None:
    async with lab.writing():
        for _ in range(3):
            process = spawn(lab, mode)
            await until(lambda: _relaying(lab), what="the relay owns all groups")
            await _progress(lab)
            assert await process.terminated() == 0, process.output()
            assert "drained" in process.output()
            assert await owners(lab) == {}
        last = spawn(lab, mode, "--workers", "3")
        await until(lambda: _owners(lab, 3), what="three workers share")
    await lab.arrived()
    assert await last.terminated() == 0, last.output()
    assert check(lab.journal, await lab.arrived()) == 0


async def _progress(lab: World) -> None:
    """Until every group has moved twice from where it stands now."""
    for _ in range(2):
        before = await _places(lab)

        async def moved(before: dict[int, tuple[int, int]] = before) -> bool:
            return all(place > before[group] for group, place in (await _places(lab)).items())

        await until(moved, what="every group moves")


async def _places(lab: World) -> dict[int, tuple[int, int]]:
    sql = "SELECT shard, from_tick, after_position FROM soma.shards WHERE reader = $1"
    return {row[0]: (row[1], row[2]) for row in await lab.pool.fetch(sql, f"relay:{lab.name}")}


async def _other_owner(lab: World, before: set[str]) -> bool:
    now = await owners(lab)
    return len(now) == 8 and not set(now.values()) & before


async def _owners(lab: World, count: int) -> bool:
    now = await owners(lab)
    return len(now) == 8 and len(set(now.values())) == count
