"""Kafka: reachable, its topics as they must be, its clock."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

from soma_common.cli.checks.database import clock
from soma_common.cli.checks.findings import Finding, Subject, fail, failed, ok, skipped, warn
from soma_common.config import SomaConfig
from soma_common.errors import SomaError
from soma_common.kafka.inspecting import ClusterFacts, TopicFacts, inspect

_FEW: Final = 3  # partitions
_LARGEST: Final = 1_048_588  # bytes: Kafka's own default, above an event of the largest size
_TRANSACTION: Final = 60_000  # milliseconds: what the relay's transactions may take


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Everything about Kafka; nothing in standalone mode."""
    config = SomaConfig.from_env(subject.env)
    if not config.uses_kafka:
        yield skipped("reachable", "there is no Kafka in standalone mode")
        return
    try:
        facts = await inspect(
            config.kafka_bootstrap, config.kafka_security, [config.topic], timeout=subject.limits.within
        )
    except SomaError as error:
        yield failed("reachable", error)
        return
    yield ok("reachable", f"{facts.brokers} broker{'' if facts.brokers == 1 else 's'} at {config.kafka_bootstrap}")
    topic = facts.topics[config.topic]
    if topic is None:
        cure = "start the application, which makes it where it may; or make it with the cluster's own tools."
        yield fail("topic", f"there is no topic {config.topic}", cure)
    else:
        for finding in _topic(topic, facts):
            yield finding
    for finding in _broker(facts, config):
        yield finding
    if facts.ahead is None:
        yield skipped("controller clock", "this cluster does not tell its time")
    else:
        yield clock(
            "controller clock",
            "the controller's",
            facts.ahead.total_seconds(),
            facts.give.total_seconds(),
            subject.limits,
        )


def _topic(topic: TopicFacts, facts: ClusterFacts) -> list[Finding]:
    return [_partitions(topic), _copies(topic, facts), _size(topic)]


def _partitions(topic: TopicFacts) -> Finding:
    text = f"{topic.name} has {topic.partitions} partition{'' if topic.partitions == 1 else 's'}"
    if topic.leaderless:
        return fail("topic", f"{text}, {topic.leaderless} without a leader", "start the brokers that are away.")
    if topic.partitions < _FEW:
        cure = f"no more processes of a consumer work at once. Add some, then `somastack topics accept {topic.name}`."
        return warn("topic", text, cure)
    return ok("topic", text)


def _copies(topic: TopicFacts, facts: ClusterFacts) -> Finding:
    least = int(topic.settings.get("min.insync.replicas", "1"))
    text = f"{topic.replicas} of each record, {topic.in_sync} in step, min.insync.replicas={least}"
    if topic.in_sync < least:
        cure = "start the brokers that are away, give the topic more replicas, or lower min.insync.replicas."
        return fail("copies", f"{text}: Kafka refuses every record", cure)
    if facts.brokers > 1 and topic.replicas == 1:
        return warn("copies", f"{text}: a broker that is lost takes records along", "give the topic 3 replicas.")
    if topic.replicas > 2 and least < 2:
        cure = "set min.insync.replicas=2 on the topic."
        return warn("copies", f"{text}: a record may be acknowledged by one broker alone", cure)
    return ok("copies", text)


def _size(topic: TopicFacts) -> Finding:
    largest = int(topic.settings.get("max.message.bytes", str(_LARGEST)))
    text = f"records of up to {largest:,} bytes"
    if largest < _LARGEST:
        cure = f"set max.message.bytes={_LARGEST} on the topic, or message.max.bytes on the brokers."
        return fail("message size", f"{text}: large events do not fit, and are parked", cure)
    return ok("message size", text)


def _broker(facts: ClusterFacts, config: SomaConfig) -> list[Finding]:
    most = int(facts.settings.get("transaction.max.timeout.ms", str(_TRANSACTION)))
    if config.exactly_once and most < _TRANSACTION:
        cure = f"set transaction.max.timeout.ms={_TRANSACTION} or more on the brokers."
        return [fail("transactions", f"Kafka allows {most} ms, the relay asks for {_TRANSACTION}", cure)]
    return []
