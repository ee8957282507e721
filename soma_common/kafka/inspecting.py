"""A look at a cluster and some of its topics, for `somastack doctor` and `somastack status`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import KafkaError

from soma_common.config import KafkaSecurity
from soma_common.kafka.bounded import bounded
from soma_common.kafka.clients import client_arguments, unreachable
from soma_common.kafka.controller_clock import controller_time

_UNKNOWN: Final = 3


@dataclass(frozen=True, slots=True)
class TopicFacts:
    """A topic as its cluster describes it. ``replicas`` and ``in_sync`` are those of the partition with the fewest."""

    name: str
    partitions: int
    replicas: int
    in_sync: int
    leaderless: int
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """A cluster. ``ahead`` is how far its controller's clock is ahead of ours, and ``give`` how exact that is.

    ``version`` is that of the protocol between its brokers, where they tell it.
    """

    brokers: int
    topics: Mapping[str, TopicFacts | None]
    settings: Mapping[str, str]
    ahead: timedelta | None
    give: timedelta
    version: str = ""


async def inspect(
    bootstrap: str, security: KafkaSecurity, topics: Collection[str], *, timeout: float = 5.0
) -> ClusterFacts:
    """Ask a cluster about itself; ``timeout`` (seconds) bounds every question. A topic that is missing is None.

    Raises:
        BrokerUnavailable: no broker answers in time.
        ConfigurationError: the security settings are not whole.
    """
    arguments = client_arguments(bootstrap, security)
    client = AIOKafkaAdminClient(**arguments, request_timeout_ms=int(timeout * 1000))
    try:
        await bounded(client.start(), timeout)
        cluster = await bounded(client.describe_cluster(), timeout)
        nodes = [broker["node_id"] for broker in cluster["brokers"]]
        found = {name: await _topic(client, name, timeout) for name in sorted(set(topics))}
        settings = await _settings(client, ConfigResourceType.BROKER, str(nodes[0]), timeout) if nodes else {}
        ahead, give = await _clock(client, timeout)
        return ClusterFacts(len(nodes), found, settings, ahead, give, settings.get("inter.broker.protocol.version", ""))
    except (KafkaError, OSError, TimeoutError) as error:
        raise unreachable(bootstrap, error) from error
    finally:
        with suppress(KafkaError, OSError, TimeoutError):
            await bounded(client.close(), timeout)


async def _topic(client: AIOKafkaAdminClient, name: str, timeout: float) -> TopicFacts | None:
    described = (await bounded(client.describe_topics([name]), timeout))[0]
    parts = described["partitions"]
    if described["error_code"] == _UNKNOWN or not parts:
        return None
    return TopicFacts(
        name, len(parts), min(len(part["replicas"]) for part in parts), min(len(part["isr"]) for part in parts),
        sum(part["leader"] < 0 for part in parts), await _settings(client, ConfigResourceType.TOPIC, name, timeout),
    )  # fmt: skip


async def _settings(client: AIOKafkaAdminClient, kind: Any, name: str, timeout: float) -> dict[str, str]:
    """The settings of a broker or topic; none where this user may not see them."""
    answers = await bounded(client.describe_configs([ConfigResource(kind, name)]), timeout)
    entries = [
        entry for answer in answers for resource in answer.resources if resource[0] == 0 for entry in resource[4]
    ]
    return {str(entry[0]): str(entry[1]) for entry in entries}


async def _clock(client: AIOKafkaAdminClient, timeout: float) -> tuple[timedelta | None, timedelta]:
    """The clock at the middle of the question; the second of two, since the first may connect."""
    ahead, give = None, timedelta()
    for _ in range(2):
        began = time.monotonic()
        asked = datetime.now(UTC)
        with suppress(KafkaError, asyncio.TimeoutError):
            there = await bounded(controller_time(client._client), timeout)
            give = timedelta(seconds=time.monotonic() - began) / 2
            ahead = None if there is None else there - (asked + give)
    return ahead, give + timedelta(milliseconds=1)
