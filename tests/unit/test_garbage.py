"""The collector is calm while services run, and what an application chose stays."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from soma_common.garbage import OBJECTS, calm_collector
from soma_common.service import Service, run_until_signalled


@pytest.fixture(autouse=True)
def _thresholds() -> Iterator[None]:
    before = gc.get_threshold()
    yield
    gc.set_threshold(*before)


class Looks(Service):
    """Ends after one look at the collector."""

    seen: tuple[int, ...] = ()

    async def run(self) -> None:
        self.seen = gc.get_threshold()


async def test_calm_while_services_run_and_as_it_was_afterwards() -> None:
    gc.set_threshold(700, 10, 10)
    service = Looks("looks")
    await run_until_signalled(service)
    assert service.seen == (OBJECTS, 10, 10)
    assert gc.get_threshold() == (700, 10, 10)


def test_as_it_was_after_an_error_too() -> None:
    gc.set_threshold(2000, 10, 10)
    with pytest.raises(ZeroDivisionError), calm_collector():
        assert gc.get_threshold()[0] == OBJECTS
        raise ZeroDivisionError
    assert gc.get_threshold() == (2000, 10, 10)


@pytest.mark.parametrize("chosen", [(0, 10, 10), (300, 5, 5), (100_000, 50, 100)])
def test_what_the_application_chose_stays(chosen: tuple[int, int, int]) -> None:
    gc.set_threshold(*chosen)
    with calm_collector():
        assert gc.get_threshold() == chosen
    assert gc.get_threshold() == chosen


def test_the_garbage_is_still_collected() -> None:
    gc.set_threshold(700, 10, 10)
    with calm_collector():
        before = gc.get_stats()[0]["collections"]
        for _ in range(3 * OBJECTS):
            circle: list[object] = []
            circle.append(circle)
        assert gc.get_stats()[0]["collections"] > before
