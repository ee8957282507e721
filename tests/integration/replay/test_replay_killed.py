"""A replay whose process is killed goes on exactly where its last commit was: every effect once."""

from __future__ import annotations

import asyncio
import random
import signal
import subprocess
from typing import Any

import pytest

from tests.integration.replay.conftest import nothing
from tests.sessions import SESSIONS
from tests.waiting import until

EVENTS = 300


async def started(replays: Any, mode: str) -> Any:
    """A run over events of which the live consumer knows every third (missing) or all (force)."""
    await replays.publish(EVENTS, keys=7)
    await replays.passed_by(nothing)
    if mode == "missing":
        await replays.forget("e.position % 3 <> 0")
    async with replays.engine() as engine:
        return await engine.start(replays.everything, mode, requested_by="test", reason="killed")


def process(replays: Any, run: Any, **given: Any) -> subprocess.Popen[str]:
    arguments = {"dsn": replays.dsn, "run": str(run.run_id)} | given
    child: subprocess.Popen[str] = replays.program(arguments)
    return child


async def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = await asyncio.to_thread(child.communicate)
    if child.returncode not in (0, -signal.SIGKILL):
        raise AssertionError(err)
    return child.returncode, out


async def finish(replays: Any, run: Any, mode: str, lease: float = 0.5) -> None:
    """Another process brings it to its end; then every effect is there once, in order."""

    async def free() -> Any:
        return (await replays.pool.fetch("SELECT leased_until < soma.now() FROM soma.replays"))[0][0]

    await until(free)
    assert await ended(process(replays, run, lease=lease)) == (0, "done\n")
    await check(replays, mode)


async def check(replays: Any, mode: str) -> None:
    rows = [row[3] for row in await replays.effects()]
    wanted = [n for n in range(EVENTS) if mode == "force" or (n + 1) % 3 != 0]
    assert rows == wanted
    read, applied = (await replays.pool.fetch("SELECT read, applied FROM soma.replays"))[0]
    assert (read, applied) == (EVENTS, len(wanted))


@pytest.mark.parametrize("mode", ["missing", "force"])
@pytest.mark.parametrize(("stage", "after"), [("handler", 33), ("save", 1), ("saved", 4), ("committed", 3)])
async def test_killed_at_each_stage(replays: Any, mode: str, stage: str, after: int) -> None:
    run = await started(replays, mode)
    code, _ = await ended(process(replays, run, die={"stage": stage, "after": after}))
    assert code == -signal.SIGKILL
    await finish(replays, run, mode)


@pytest.mark.parametrize("mode", ["missing", "force"])
async def test_killed_at_ten_random_moments(replays: Any, mode: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    run = await started(replays, mode)
    for _ in range(10):
        stage = chance.choice(["handler", "save", "saved", "committed", "moment"])
        given = {} if stage == "moment" else {"die": {"stage": stage, "after": chance.randint(1, 3)}}
        child = process(replays, run, batch=chance.randint(1, 7), lease=0.2, **given)
        if stage == "moment":
            await asyncio.sleep(chance.uniform(0.3, 0.8))
            child.kill()
        _, err = await asyncio.to_thread(child.communicate)
        # Or the lease of the one before has not ended yet, or all is done.
        assert child.returncode in (0, -signal.SIGKILL) or "ReplayRefused" in err, err
        await asyncio.sleep(0.2)
    state = (await replays.pool.fetch("SELECT state FROM soma.replays"))[0][0]
    if state == "done":
        await check(replays, mode)
    else:
        await finish(replays, run, mode)


async def test_a_paused_process_that_wakes_up_changes_nothing(replays: Any) -> None:
    run = await started(replays, "force")
    child = process(replays, run, batch=1)
    await replays.applied(5)
    child.send_signal(signal.SIGSTOP)
    await finish_beside(replays, run)
    child.send_signal(signal.SIGCONT)
    _, err = await asyncio.to_thread(child.communicate)
    assert child.returncode == 0 or "LeaseLost" in err
    await check(replays, "force")


async def finish_beside(replays: Any, run: Any) -> None:
    """The stopped process may hold its row until PostgreSQL ends its transaction: end it as the timeout would."""
    await asyncio.sleep(0.6)
    await replays.pool.fetch(
        f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} WHERE application_name = 'soma-replay' "
        "AND state LIKE 'idle in transaction%'"
    )
    await finish(replays, run, "force")
