"""Exponential backoff with full jitter."""

from __future__ import annotations

from itertools import islice

from soma_common.retry import Backoff


def test_waits_grow_to_their_ceiling() -> None:
    backoff = Backoff(base=0.1, factor=2, maximum=1.0)
    for attempt, ceiling in ((0, 0.1), (1, 0.2), (3, 0.8), (4, 1.0), (10_000, 1.0)):
        waits = [backoff.delay(attempt) for _ in range(200)]
        assert all(ceiling / 10 <= wait <= ceiling for wait in waits)
        assert max(waits) - min(waits) > ceiling / 4  # jitter: clients that failed together spread


def test_the_series_never_ends() -> None:
    assert len(list(islice(Backoff().delays(), 500))) == 500
