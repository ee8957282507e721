"""Python's garbage collector in a process that does nothing but move events."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

OBJECTS: Final = 20_000  # new objects between two looks
_PYTHONS_OWN: Final = (700, 2000)  # what a program that never thought of it has: until 3.12, since 3.13


@contextmanager
def calm_collector() -> Iterator[None]:
    """Meanwhile the collector looks at new objects 20,000 at a time; as it was afterwards.

    An event is some ten objects that live until its batch has committed, by the ten thousand at once. At Python's own
    thresholds the collector looks at each of them twice or thrice, and again and again at all that was ever imported:
    that took two thirds of the time in which an event is read (docs/decisions/0013). None of them is garbage.
    What an application chose by ``gc.set_threshold`` stays.
    """
    young, *older = gc.get_threshold()
    if young not in _PYTHONS_OWN:
        yield
        return
    gc.set_threshold(OBJECTS, *older)
    try:
        yield
    finally:
        gc.set_threshold(young, *older)
