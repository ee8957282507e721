"""Waiting with a bound: what holds is returned, what does not is told."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from soma_common.testing import eventually, sync_eventually


def _counting(until: int) -> Callable[[], int | None]:
    seen: list[int] = []

    def condition() -> int | None:
        seen.append(1)
        return len(seen) if len(seen) >= until else None

    return condition


async def test_the_value_that_holds_is_returned() -> None:
    assert await eventually(_counting(4)) == 4
    assert sync_eventually(_counting(4)) == 4


async def test_an_async_condition_and_one_that_asserts() -> None:
    condition = _counting(3)

    async def asserts() -> str:
        assert condition() == 3
        return "done"

    assert await eventually(asserts) == "done"


async def test_other_tasks_and_threads_go_on_meanwhile() -> None:
    done, thread_done = asyncio.Event(), threading.Event()
    asyncio.get_running_loop().call_later(0.02, done.set)
    threading.Timer(0.02, thread_done.set).start()
    assert await eventually(done.is_set)
    assert sync_eventually(thread_done.is_set)


async def test_what_does_not_hold_tells_what_it_came_to() -> None:
    with pytest.raises(AssertionError, match=r"list did not hold within 0.05 s: it was \[\]"):
        await eventually(list, within=0.05)
    with pytest.raises(AssertionError, match=r"the list did not hold within 0.05 s: it was \[\]"):
        sync_eventually(list, within=0.05, what="the list")


async def test_the_last_assertion_is_told_and_is_the_cause() -> None:
    def asserts() -> None:
        assert 1 == 2, "one is two"

    with pytest.raises(AssertionError, match="the balance did not hold within 0.05 s: one is two") as caught:
        await eventually(asserts, within=0.05, what="the balance")
    assert isinstance(caught.value.__cause__, AssertionError)


async def test_any_other_error_ends_the_wait_at_once() -> None:
    def broken() -> None:
        raise ZeroDivisionError("no")

    with pytest.raises(ZeroDivisionError):
        await eventually(broken, within=60)
    with pytest.raises(ZeroDivisionError):
        sync_eventually(broken, within=60)


async def test_a_condition_that_hangs_is_cut_off() -> None:
    async def hangs() -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="hangs did not hold within 0.05 s: it was None"):
        await eventually(hangs, within=0.05)


async def test_its_own_timeout_is_its_own() -> None:
    async def times_out() -> None:
        async with asyncio.timeout(0.001):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        await eventually(times_out, within=60)


async def test_misuse_is_told() -> None:
    with pytest.raises(TypeError, match="is no function"):
        await eventually(True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="within is 0"):
        await eventually(lambda: True, within=0)

    async def asynchronous() -> bool:
        return True

    with pytest.raises(TypeError, match="use `await eventually"):
        sync_eventually(asynchronous)
