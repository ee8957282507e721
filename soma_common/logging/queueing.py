"""Logging that does not wait: a handler that hands lines to a thread, which writes them."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Final, Literal
from weakref import WeakSet

from soma_common.errors import ConfigurationError

WhenFull = Literal["drop", "block"]

_STOP: Final = object()
_POLL_SECONDS: Final = 0.002
_FORK_SECONDS: Final = 1.0


class QueueingHandler(logging.Handler):
    """Formats a record where it is logged, and has a thread write the line: an event loop never waits for a slow disk,
    pipe or terminal.

    Formatting at once means that the line says what was true then, and has the ids of the task that logged. The queue
    is bounded. ``drop`` leaves out new records while it is full, counts them (``dropped``) and, when there is room
    again, writes a warning that says how many; ``block`` waits for room. ``close`` (at exit by ``logging.shutdown``)
    writes what is queued. A forked child begins with an empty queue and a thread of its own.

    Args:
        target: what writes the lines, such as a ``SomaStackHandler`` or a ``RotatingFileHandler``. Its formatter is
            used here; it gets records that hold nothing but the line.
        capacity: most records that wait, at least 1.
        when_full: ``"drop"`` or ``"block"``.
        drain: seconds that ``close`` waits for a slow target, at most; what is left then is counted as dropped.

    Raises:
        ConfigurationError: a wrong target, capacity, policy or time.
    """

    def __init__(
        self,
        target: logging.Handler,
        *,
        capacity: int = 10_000,
        when_full: WhenFull = "drop",
        drain: float = 5.0,
    ) -> None:
        if capacity < 1 or not drain > 0 or when_full not in ("drop", "block"):
            raise ConfigurationError(
                f"capacity={capacity!r}, when_full={when_full!r:.40}, drain={drain!r} cannot be.",
                cure="capacity is 1 or more, when_full is 'drop' or 'block', drain is more than 0 seconds.",
            )
        if not isinstance(target, logging.Handler):
            raise ConfigurationError(
                f"A {type(target).__name__} writes no records.", cure="give a handler, or use queued_handler()."
            )
        super().__init__(target.level)
        self.setFormatter(target.formatter)
        target.setFormatter(None)
        self._target, self._capacity, self._when_full, self._drain = target, capacity, when_full, drain
        self._closed = False
        self.dropped = self._told = 0
        self._begin()
        _ALL.add(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record's line."""
        try:
            if self._is_full() and not self._room_comes():
                self.dropped += 1  # under the handler's lock, as all of this
            else:
                self._put(_line_only(record, self.format(record)))
        except Exception:
            self.handleError(record)

    def flush(self) -> None:
        """Nothing to do: the thread flushes. ``close`` waits for it."""

    def wait(self, seconds: float) -> bool:
        """Wait until everything queued so far is written; whether it was within that time."""
        end = time.monotonic() + seconds
        goal = self._queued
        while self._written < goal and not self._closed and time.monotonic() < end:
            time.sleep(_POLL_SECONDS)
        return self._written >= goal

    def close(self) -> None:
        """Write what is queued, and end the thread. Later records are written by whoever logs them."""
        closed, self._closed = self._closed, True
        if not closed:
            thread = self._stop()
            if thread is not None and thread is not threading.current_thread():
                thread.join(self._drain)
            if thread is None or not thread.is_alive():
                self._write_rest()
            else:
                self._leave(self._queue.qsize())
        with suppress(Exception):
            self._target.close()
        super().close()

    def _stop(self) -> threading.Thread | None:
        """Tell the thread to end, after whoever is queueing a record has done so; the thread, if there is one."""
        lock: Any = self.lock
        held = lock.acquire(timeout=self._drain)
        try:
            self._queue.put(_STOP)
            return self._threads.get("writer")
        finally:
            if held:
                lock.release()

    def _put(self, record: logging.LogRecord) -> None:
        if self._closed or not self._has_thread():
            self._write_rest()  # in order: first those that were queued
            self._write(record)
        else:
            self._queued += 1
            self._queue.put(record)

    def _is_full(self) -> bool:
        return self._queue.qsize() >= self._capacity and not self._closed

    def _room_comes(self) -> bool:
        """Wait for room, where that was chosen. The thread never waits for itself."""
        if self._when_full == "drop" or threading.current_thread() is self._threads.get("writer"):
            return False
        while self._is_full():
            time.sleep(_POLL_SECONDS)  # no lock: a signal's handler may log while its own thread is here
        return True

    def _has_thread(self) -> bool:
        """Start the thread at the first record; False where none can be started any more (the interpreter ends)."""
        if self._threads:
            return True
        made = threading.Thread(target=self._run, args=(self._queue,), name="soma-logging", daemon=True)
        # One step: of several threads, and of a signal's handler that logs right here, one starts the only thread.
        if self._threads.setdefault("writer", made) is made:
            try:
                made.start()
            except RuntimeError:
                self._threads.clear()
                return False
            _at_end_of_a_child(self)
        return True

    def _run(self, waiting: queue.SimpleQueue[Any]) -> None:
        while (record := waiting.get()) is not _STOP:
            self._write(record)
            self._written += 1
            if self.dropped > self._told and waiting.qsize() <= self._capacity // 2:
                self._tell()

    def _write(self, record: logging.LogRecord) -> None:
        with self._writing, suppress(Exception):  # the target has had its chance to report
            self._target.handle(record)

    def _write_rest(self) -> None:
        """Write what the thread did not get to, in this one."""
        with suppress(queue.Empty):
            while True:
                record = self._queue.get_nowait()
                if record is _STOP:
                    self._queue.put(_STOP)  # the thread's
                    break
                self._write(record)
                self._written += 1
        if self.dropped > self._told:
            self._tell()

    def _tell(self) -> None:
        lost, self._told = self.dropped - self._told, self.dropped
        message = "%d log records were dropped: %d were waiting to be written"
        record = logging.LogRecord(__name__, logging.WARNING, __file__, 0, message, (lost, self._capacity), None)
        record.__dict__["dropped"] = lost
        with suppress(Exception):  # another formatter than ours, which wants fields that this record does not have
            self._write(_line_only(record, self.format(record)))

    def _leave(self, left: int) -> None:
        self.dropped += left
        with suppress(Exception):
            print(f"{left} log records were not written within {self._drain:g} s.", file=sys.__stderr__)

    def _begin(self) -> None:
        """An empty queue and no thread: at first, and in a forked child, whose parent writes what was queued."""
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads: dict[str, threading.Thread] = {}
        self._writing = threading.RLock()
        self._held = False
        self._told = self.dropped = self._queued = self._written = 0


_ALL: Final[WeakSet[QueueingHandler]] = WeakSet()


def _line_only(record: logging.LogRecord, line: str) -> logging.LogRecord:
    """The record as a target needs it: its line, its level and where it is from."""
    copied = logging.LogRecord.__new__(logging.LogRecord)  # its __init__ would find out anew what is known
    copied.__dict__.update(record.__dict__)
    copied.msg = copied.message = line
    copied.args = copied.exc_info = copied.exc_text = copied.stack_info = None
    return copied


def _at_end_of_a_child(handler: QueueingHandler) -> None:
    """Processes that multiprocessing forked end without ``atexit``, and by its own finalizers."""
    processes, util = sys.modules.get("multiprocessing.process"), sys.modules.get("multiprocessing.util")
    if processes is not None and util is not None and processes.parent_process() is not None:
        util.Finalize(None, handler.close, exitpriority=-100)


def _before_fork() -> None:
    """No fork while a line is written: the child would inherit the locks of its stream. A stuck target is not waited
    for longer than a second."""
    for handler in list(_ALL):
        handler._held = handler._writing.acquire(timeout=_FORK_SECONDS)


def _after_fork_in_parent() -> None:
    for handler in list(_ALL):
        if handler._held:
            handler._held = False
            handler._writing.release()


def _after_fork_in_child() -> None:
    for handler in list(_ALL):
        handler._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
