"""A run that is killed, frozen, or out of space leaves the log whole; the next one goes on where it was."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import RetentionError
from tests.core_support import connected
from tests.sessions import SESSIONS
from tests.waiting import until

PROGRAM = Path(__file__).with_name("program.py")
TYPES = ("order.paid", "telemetry.seen")
STAGES = ["opened", "half", "file", "manifest", "verified", "began", "dropped", "thinned", "removed"]
LEASE = 2.0


def process(retained: Any, **given: Any) -> subprocess.Popen[str]:
    arguments = {"dsn": retained.dsn, "folder": str(retained.folder), "lease": LEASE, "whole": True} | given
    made = subprocess.Popen(
        [sys.executable, str(PROGRAM), json.dumps(arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    retained.processes.append(made)
    return made


async def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = await asyncio.to_thread(child.communicate)
    return child.returncode, err


async def lease_over(retained: Any) -> None:
    async def free() -> Any:
        return (await retained.later.fetch("SELECT leased_until <= soma.now() FROM soma.retention_lease"))[0][0]

    await until(free)


async def finish(retained: Any, events: list[Any], **given: Any) -> None:
    """Another process brings it to its end; then nothing is lost, nothing is twice, and what had to go is gone."""
    await lease_over(retained)
    code, err = await ended(process(retained, **given))
    assert code == 0, err
    await retained.whole(events)
    archives = await retained.archives()
    assert {archive.state for archive in archives} == {"removed"}
    end = max(archive.upper_position for archive in archives)
    left = {event.event_type for event in await retained.log() if event.position < end}
    assert left == (set() if given.get("whole", True) else {"order.paid"})


@pytest.mark.parametrize(
    ("stage", "whole"),
    [(stage, whole) for stage in STAGES for whole in (True, False)
     if (stage, whole) not in {("thinned", True), ("removed", True), ("dropped", False)}],
)  # fmt: skip
async def test_killed_at_each_stage(retained: Any, stage: str, whole: bool) -> None:
    events = await retained.fill(300, types=TYPES)
    for after in (1, 2):
        child = process(retained, whole=whole, die={"stage": stage, "after": after})
        code, err = await ended(child)
        assert code == -signal.SIGKILL, err
        await retained.whole(events)  # at no moment is anything missing
        await lease_over(retained)
    await finish(retained, events, whole=whole)


async def test_killed_at_ten_random_moments(retained: Any) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    events = await retained.fill(400, types=TYPES)
    for _ in range(10):
        child = process(retained, whole=False, lease=0.3)
        assert child.stdout is not None
        await asyncio.to_thread(child.stdout.readline)
        await asyncio.sleep(chance.uniform(0.0, 0.6))
        child.kill()
        await ended(child)
        await retained.whole(events)
        await lease_over(retained)
    await finish(retained, events, whole=False)


async def test_a_frozen_run_that_wakes_up_spoils_nothing(retained: Any) -> None:
    """It wakes up in the middle of an export, when another run has archived and dropped what it was reading."""
    events = await retained.fill(300, types=TYPES)
    child = process(retained)

    async def writing() -> bool:
        return retained.folder.exists() and any(retained.folder.rglob("part-*.avro"))

    await until(writing)
    child.send_signal(signal.SIGSTOP)
    await lease_over(retained)
    await retained.later.fetch(
        f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} "
        "WHERE state LIKE 'idle in transaction%' OR (state = 'active' AND wait_event = 'ClientRead')"
    )  # as its timeouts would; between preparing a statement and running it a client holds locks too
    await finish(retained, events)
    child.send_signal(signal.SIGCONT)
    code, err = await ended(child)
    assert code == 0 or any(
        word in err for word in ("LeaseLost", "ArchiveCorrupt", "DatabaseUnavailable", "RetentionError")
    ), err
    await retained.whole(events)


async def test_a_full_disk_leaves_the_log_as_it_was(retained: Any) -> None:
    events = await retained.fill(300, types=TYPES)
    code, err = await ended(process(retained, limit=600))
    assert code == 1
    assert "ArchiveUnavailable" in err
    assert "space" in err
    assert await retained.log() == events
    assert await retained.archived() == []
    assert not list(retained.folder.rglob("*.tmp"))
    await finish(retained, events)


async def test_a_small_file_system_is_full(retained: Any) -> None:
    events = await retained.fill(400, types=TYPES)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(retained.folder)]
    await asyncio.to_thread(subprocess.run, mount, check=True)
    try:
        with pytest.raises(RetentionError, match="No space left"):
            await retained.retain()
        assert len(await retained.log()) > 0
        await retained.whole(events)
    finally:
        await asyncio.to_thread(subprocess.run, ["umount", str(retained.folder)], check=True)


async def test_connections_that_are_cut_lose_nothing(retained: Any) -> None:
    events = await retained.fill(400, types=TYPES)
    child = process(retained, whole=False)
    assert child.stdout is not None
    await asyncio.to_thread(child.stdout.readline)
    async with connected(retained.dsn) as admin:
        while child.poll() is None:
            await admin.fetch(
                f"SELECT pg_terminate_backend(pid) FROM {SESSIONS} WHERE application_name = 'soma-common'"
            )
            await asyncio.sleep(0.1)
    await ended(child)
    await retained.whole(events)
    await finish(retained, events, whole=False)
