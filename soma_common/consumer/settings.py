"""How a consumer works."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from soma_common.consumer.handlers import check_consumer
from soma_common.consumer.order import Order
from soma_common.consumer.retries import RetryPolicy
from soma_common.dlq.mirror import MirrorSettings
from soma_common.dlq.models import LetterNotice
from soma_common.errors import ConfigurationError
from soma_common.ranges import check_settings
from soma_common.retry import Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """How a consumer works. Times are seconds.

    Args:
        lanes: most transactions at once, each on a connection of its own (two of the pool are left for other work;
            those of handlers that are plain functions come beside the pool's). Events of a key always go through one
            lane.
        batch: most events in one transaction. What is there is applied at once: one event when idle, many under load.
        order: which events wait for each other: those of a key, of a partition, or none. Settle the open dead letters
            of a consumer before you change it: they, and what is blocked behind them, wait under the sequence of the
            old order, and under another one later events of theirs would not be kept behind them.
        ahead: most events of a partition that are fetched and not settled; then its fetching pauses.
        ahead_bytes: the same in bytes.
        timeout: a handler that works longer on an event (a batch handler: on its events) is cancelled, and the event
            counts as failed. Of a plain function, the statement that runs is cancelled.
        idle_timeout: PostgreSQL ends a batch's transaction whose process fell silent for so long, so that a paused
            process does not keep others waiting; at least ``timeout``.
        unknown: what becomes of events without a handler: passed over, or refused (they become dead letters).
        retry: when and how often a failing event is tried again, and which errors are whose.
        drain: how long what is in flight may take before its partition is given away; then it is abandoned. With Kafka
            less than the group waits (``SourceSettings.rebalance``, 30): otherwise the consumer is refused.
        save_every: between two writes of the positions. What a crash makes the next owner read again.
        redrives: most sequences of dead letters that this worker re-drives at once; 0: it leaves them to others.
        redrive_every: between two looks for letters that are due.
        poison_claims: when a partition was taken so often and never moved, its next owner works in single file.
        poison_tries: an event that was begun alone so often and never ended is buried.
        poison_wait: before such an event is begun again, nothing is done for so long (up to twice as long, times the
            deaths): a process that dies within that dies of something else, and the event does not count for it.
        backoff: waits while the database or the broker is away.
        stuck: without any progress for so long, while no handler runs, the worker hangs up and begins anew; after three
            times as long it is not live. Looking for events and finding none is progress.
        on_dead_letter: called with a ``LetterNotice`` after an event became a letter and after a letter died: at least
            once by the process that wrote it. A coroutine function, or one that runs in a thread; ten seconds each.
            What it raises is logged and keeps nothing waiting.
        mirror: copies each new letter to a Kafka topic, through the outbox: both are written, or neither.
    """

    lanes: int = 8
    batch: int = 200
    order: Order = Order.KEY
    ahead: int = 2000
    ahead_bytes: int = 16 * 1024 * 1024
    timeout: float = 30.0
    idle_timeout: float = 30.0
    unknown: Literal["ignore", "refuse"] = "ignore"
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    drain: float = 10.0
    save_every: float = 0.1
    redrives: int = 2
    redrive_every: float = 1.0
    poison_claims: int = 3
    poison_tries: int = 3
    poison_wait: float = 1.0
    backoff: Backoff = field(default_factory=Backoff)
    stuck: float = 60.0
    on_dead_letter: Callable[[LetterNotice], Any] | None = None
    mirror: MirrorSettings | None = None

    def __post_init__(self) -> None:
        check_settings(self, **_WANTED)
        if self.unknown not in ("ignore", "refuse"):
            raise ConfigurationError(f"unknown={self.unknown!r}.", cure="use 'ignore' or 'refuse'.")
        if self.on_dead_letter is not None and not callable(self.on_dead_letter):
            raise ConfigurationError(f"on_dead_letter={self.on_dead_letter!r:.80}.", cure="pass a function.")
        if self.mirror is not None:
            check_settings(self, mirror=MirrorSettings)
        if self.idle_timeout < self.timeout:
            raise ConfigurationError(
                f"idle_timeout={self.idle_timeout} is less than timeout={self.timeout}.",
                cure="PostgreSQL would end transactions of handlers that may still work: raise idle_timeout.",
            )
        object.__setattr__(self, "order", _order(self.order))


_WANTED: Final[dict[str, tuple[float, float] | type]] = {
    "lanes": (1, 1000),
    "batch": (1, 10_000),
    "ahead": (1, 1_000_000),
    "ahead_bytes": (1024, 1 << 40),
    "timeout": (0.05, 86_400),
    "idle_timeout": (0.05, 2_000_000),  # PostgreSQL counts milliseconds in 31 bits
    "retry": RetryPolicy,
    "drain": (0.0, 3600),
    "save_every": (0.001, 60),
    "redrives": (0, 100),
    "redrive_every": (0.01, 3600),
    "poison_claims": (1, 1000),
    "poison_tries": (1, 1000),
    "poison_wait": (0.0, 3600),
    "backoff": Backoff,
    "stuck": (0.1, 86_400),
}


class SettingsByConsumer:
    """The settings of an application's consumers: the same for all, or by name.

    Raises:
        ConfigurationError: they are of another kind.
    """

    def __init__(self, given: ConsumerSettings | Mapping[str, ConsumerSettings] | None) -> None:
        self._by_name: Mapping[str, ConsumerSettings] = {}
        self._others = ConsumerSettings()
        if isinstance(given, Mapping):
            self._by_name = dict(given)
        elif given is not None:
            self._others = given
        for name in self._by_name:
            check_consumer(name)
        for each in self._all:
            if not isinstance(each, ConsumerSettings):
                raise ConfigurationError(
                    f"settings is or holds a {type(each).__name__}, not ConsumerSettings.",
                    cure="pass ConsumerSettings(…), or a dict of them by consumer.",
                )

    def of(self, consumer: str, declared: Collection[str]) -> ConsumerSettings:
        """Those of a consumer; the defaults where others are named and it is not. ``declared`` are all consumers that
        have handlers: this is asked when they are declared, so a name that none of them has is a mistake.
        """
        strangers = [name for name in self._by_name if name not in declared]
        if strangers:
            raise ConfigurationError(
                f"settings names consumer {strangers[0]!r:.200}, which has no handler here.",
                cure=f"declare its handlers, or correct the name; known: {', '.join(declared) or 'none'}.",
            )
        return self._by_name.get(consumer, self._others)

    @property
    def mirrors(self) -> set[str]:
        """The topics that dead letters are copied to."""
        return {each.mirror.topic for each in self._all if each.mirror is not None}

    @property
    def _all(self) -> list[ConsumerSettings]:
        return [self._others, *self._by_name.values()]


def _order(given: str) -> Order:
    try:
        return Order(given)
    except ValueError:
        raise ConfigurationError(f"order={given!r}.", cure="use key, partition or none.") from None
