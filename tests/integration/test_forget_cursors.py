"""Forgetting the cursors in Kafka while a relay holds, and takes back, its identity."""

from __future__ import annotations

from uuid import uuid4

from soma_common.kafka.publisher import KafkaPublisher, KafkaPublishers, PublisherSettings, forget_cursors
from soma_common.testing.backends import KafkaHandle


class _Contested(KafkaPublishers):
    """Another relay takes the identity back right after the first times it was opened."""

    rivals = 2

    async def open(self, identity: str | None) -> KafkaPublisher:
        publisher = await super().open(identity)
        if self.rivals > 0:
            self.rivals -= 1
            rival = await super().open(identity)
            await rival.close()
        return publisher


async def test_a_relay_that_takes_its_identity_back_is_fenced_off_again(soma_kafka: KafkaHandle) -> None:
    settings, identity = PublisherSettings(bootstrap=soma_kafka.bootstrap), f"soma-relay-test-{uuid4().hex}"
    publishers = KafkaPublishers(settings)
    first = await publishers.open(identity)
    await first.commit("1.2/-/0")
    await first.close()
    contested = _Contested(settings)
    await forget_cursors(contested, [identity])
    after = await publishers.open(identity)
    assert contested.rivals == 0
    assert after.stored is None
    for thing in (after, contested, publishers):
        await thing.close()
