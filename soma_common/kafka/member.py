"""A member of a consumer group: its settings, and aiokafka's client for it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from aiokafka import AIOKafkaConsumer
from aiokafka.abc import ConsumerRebalanceListener
from aiokafka.errors import KafkaError

from soma_common.config import KafkaSecurity
from soma_common.errors import ConfigurationError
from soma_common.kafka.bounded import bounded
from soma_common.kafka.clients import client_arguments
from soma_common.ranges import check_settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSettings:
    """How a consumer reads topics. Times are seconds.

    Args:
        bootstrap: ``host:port,host:port``.
        group: the consumer group, ``soma.<service>.<consumer>``.
        topics: what to read.
        wait: how long a fetch waits for records.
        session: after so long without a heartbeat the group gives the partitions of a process to others.
        rebalance: how long members may take to finish what they have in flight when the group is rebalanced; more than
            ``ConsumerSettings.drain`` and a third of ``session``, after which the last member has heard of it.
        commit_every: how often Kafka is told the offsets; only lag tools read them.
        probe_every: how often the broker is asked for the topics' ends while nothing comes.
        metadata_age: how often the brokers are asked for new partitions, and whether topics were made anew.
        instance: a name that survives restarts (static membership), or None.
    """

    bootstrap: str
    group: str
    topics: tuple[str, ...]
    security: KafkaSecurity = field(default_factory=KafkaSecurity)
    wait: float = 0.2
    session: float = 10.0
    rebalance: float = 30.0
    commit_every: float = 1.0
    probe_every: float = 5.0
    metadata_age: float = 30.0
    instance: str | None = None

    def __post_init__(self) -> None:
        if not self.topics or isinstance(self.topics, str):  # one text would be a topic per letter
            raise ConfigurationError(f"Group {self.group} has no topic.", cure="name at least one, in a tuple.")
        check_settings(
            self, wait=(0.001, 300), session=(0.1, 3600), rebalance=(0.1, 3600), commit_every=(0.01, 3600),
            probe_every=(0.01, 3600), metadata_age=(0.01, 86_400),
        )  # fmt: skip

    def check_drain(self, seconds: float) -> None:
        """Refuse a drain in whose midst the group would give the partitions to others, and the member be thrown out."""
        heard = self.heartbeat
        if seconds + heard >= self.rebalance:
            raise ConfigurationError(
                f"ConsumerSettings.drain={seconds:g} is too long for SourceSettings.rebalance={self.rebalance:g}: "
                f"a member hears of a rebalance up to {heard:.3g} s (session / 3) after it began.",
                cure=f"lower drain below {max(0.0, self.rebalance - heard):.3g}, or raise rebalance.",
            )

    @property
    def heartbeat(self) -> float:
        """Seconds between two heartbeats."""
        return self.session / 3


class Listener(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Passes on what the group does. aiokafka logs and swallows what is raised here, so nothing may be."""

    def __init__(self, revoked: Callable[[], Awaitable[None]], handed_out: Callable[[], None]) -> None:
        self._revoked, self._handed_out = revoked, handed_out

    async def on_partitions_revoked(self, revoked: Iterable[Any]) -> None:
        await self._revoked()

    async def on_partitions_assigned(self, assigned: Iterable[Any]) -> None:
        self._handed_out()


def new_member(settings: SourceSettings) -> AIOKafkaConsumer:
    """A client that commits nothing by itself and never chooses an offset."""
    return AIOKafkaConsumer(
        group_id=settings.group,
        group_instance_id=settings.instance,
        enable_auto_commit=False,
        auto_offset_reset="none",  # a lost offset is an error, never a jump
        isolation_level="read_committed",
        session_timeout_ms=int(settings.session * 1000),
        heartbeat_interval_ms=int(settings.heartbeat * 1000),
        rebalance_timeout_ms=int(settings.rebalance * 1000),
        metadata_max_age_ms=int(settings.metadata_age * 1000),
        **client_arguments(settings.bootstrap, settings.security),
    )


async def close_member(consumer: AIOKafkaConsumer) -> None:
    """Close a client, whatever state it is in; what a failed ``stop`` leaves open is closed behind it."""
    try:
        await bounded(consumer.stop(), 5.0)
    except (KafkaError, OSError, TimeoutError) as error:
        log.debug("A Kafka consumer did not close cleanly: %s", error)
        with suppress(KafkaError, OSError, TimeoutError):
            await bounded(consumer._client.close(), 5.0)
