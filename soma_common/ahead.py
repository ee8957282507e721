"""Work that is begun before it is needed, while something else waits for the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Generic, TypeVar

_T = TypeVar("_T")
_STRIDE = 8  # items between two turns of the loop: their decoding takes about as long as a small statement


class Ahead(Generic[_T]):
    """At most one call that runs ahead."""

    def __init__(self) -> None:
        self._task: asyncio.Task[_T] | None = None

    def __bool__(self) -> bool:
        """Whether a call was begun and neither taken nor forgotten."""
        return self._task is not None

    def begin(self, call: Coroutine[Any, Any, _T]) -> None:
        """Run it in the background."""
        assert self._task is None, "one at a time"
        self._task = asyncio.create_task(call)

    async def take(self) -> _T:
        """The result, or the error, of the call that was begun."""
        task, self._task = self._task, None
        assert task is not None, "begin() comes first"
        return await task

    async def forget(self) -> None:
        """End the call, whatever became of it."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def strides(items: Sequence[_T]) -> AsyncIterator[Sequence[_T]]:
    """The items, a few at a time, letting others run between them: decoding a page at once would keep a batch waiting
    for its turn."""
    for start in range(0, len(items), _STRIDE):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + _STRIDE]
