"""Services start once, stop gracefully, and tell what ended them."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time

import pytest

from soma_common.service import Service, run_until_signalled


class Loop(Service):
    """Counts its rounds; drains when asked to stop."""

    def __init__(self, fails: Exception | None = None, *, deaf: bool = False) -> None:
        super().__init__("loop")
        self.fails, self.deaf = fails, deaf
        self.started, self.drained = 0, 0
        self.running = asyncio.Event()

    async def run(self) -> None:
        self.started += 1
        self.running.set()
        if self.fails is not None:
            raise self.fails
        while self.deaf:
            await asyncio.sleep(3600)
        while not await self.pause(3600):
            pass
        self.drained += 1


async def test_starting_and_stopping_twice() -> None:
    service = Loop()
    await service.stop()
    await service.start()
    await service.start()
    await service.running.wait()
    await service.stop()
    await service.stop()
    assert (service.started, service.drained) == (1, 1)
    async with service:
        assert not service.stopping.is_set()
        await asyncio.sleep(0)
    assert (service.started, service.drained) == (2, 2)


async def test_what_ends_a_service_is_raised() -> None:
    service = Loop(ZeroDivisionError("loop"))
    await service.start()
    with pytest.raises(ZeroDivisionError):
        await service.wait()
    with pytest.raises(ZeroDivisionError):
        await service.stop()
    await service.stop()
    await service.wait()


async def test_a_service_that_does_not_listen_is_cancelled() -> None:
    service = Loop(deaf=True)
    await service.start()
    await service.running.wait()
    await service.stop(patience=0.01)
    assert service.drained == 0


async def test_a_pause_ends_when_asked_to_stop() -> None:
    service = Loop()
    assert not await service.pause(0.001)
    service.stopping.set()
    assert await service.pause(3600)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_all_services(number: signal.Signals) -> None:
    services = Loop(), Loop()
    running = asyncio.create_task(run_until_signalled(*services))
    for service in services:
        await service.running.wait()
    os.kill(os.getpid(), number)
    await asyncio.wait_for(running, 10)
    assert [service.drained for service in services] == [1, 1]


class Slow(Loop):
    """Takes a moment to drain, in which signals come."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds

    async def run(self) -> None:
        print("ready", flush=True)
        await super().run()
        await asyncio.sleep(self.seconds)
        print("drained", flush=True)


async def test_a_signal_that_comes_twice_is_one() -> None:
    """``timeout`` sends it to the process and to its group."""
    service = Slow(0.2)
    running = asyncio.create_task(run_until_signalled(service))
    await service.running.wait()
    os.kill(os.getpid(), signal.SIGTERM)
    await service.stopping.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
        await asyncio.sleep(0)
    await asyncio.wait_for(running, 10)
    assert service.drained == 1


def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "import asyncio\nfrom soma_common.service import run_until_signalled\nfrom tests.unit.test_service import Slow\n"
        "asyncio.run(run_until_signalled(Slow(120), patience=120))"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            began = time.monotonic()
            while process.poll() is None and time.monotonic() - began < 60:
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
            assert time.monotonic() - began >= 1.0
            assert process.wait(1) == -signal.SIGTERM
            assert process.stdout.read() == ""
        finally:
            process.kill()


async def test_one_that_fails_stops_the_others() -> None:
    good, bad = Loop(), Loop(ZeroDivisionError("bad"))
    with pytest.raises(ZeroDivisionError):
        await asyncio.wait_for(run_until_signalled(good, bad), 10)
    assert good.drained == 1
