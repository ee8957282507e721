"""Topics: what is there, with how many partitions; making what is missing."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from soma_common.config import KafkaSecurity
from soma_common.errors import ConfigurationError
from soma_common.kafka.clients import client_arguments, unreachable
from soma_common.outbox.publishing import TopicRefused

if TYPE_CHECKING:
    from aiokafka.admin import AIOKafkaAdminClient

_NO_ERROR, _EXISTS = 0, 36
_REFUSALS = {
    3: "topic {} does not exist",
    17: "{} is not a topic name that Kafka takes",
    29: "access to topic {} is denied",
}


@dataclass(frozen=True, slots=True)
class TopicSettings:
    """A topic to make. ``copies`` None: three, or as many as there are brokers."""

    name: str
    partitions: int = 6
    copies: int | None = None
    config: Mapping[str, str] = field(default_factory=dict)


class TopicAdmin:
    """Asks brokers about topics over one connection of its own, made when needed and made again after an error."""

    def __init__(self, bootstrap: str, security: KafkaSecurity | None = None, *, timeout: float = 10.0) -> None:
        self._arguments = client_arguments(bootstrap, security or KafkaSecurity())
        self._bootstrap, self._timeout = bootstrap, timeout
        self._client: AIOKafkaAdminClient | None = None
        self._using = asyncio.Lock()

    async def partitions(self, topic: str) -> int:
        """How many partitions a topic has now; a broker that makes unknown topics by itself makes it.

        Raises:
            TopicRefused: it is unknown, its name is invalid, or access is denied.
            BrokerUnavailable: no answer in time.
        """
        described = (await self._call("describe_topics", [topic]))[0]
        code = described["error_code"]
        if code in _REFUSALS:
            raise TopicRefused(_REFUSALS[code].format(topic[:249]), cure="create it, or grant access; then unpark.")
        if code != _NO_ERROR or not described["partitions"]:
            raise unreachable(self._bootstrap, RuntimeError(f"topic {topic} has no leader yet (error {code})"))
        return len(described["partitions"])

    async def names(self) -> list[str]:
        """The topics that there are, without Kafka's own.

        Raises:
            BrokerUnavailable: no answer in time.
        """
        return sorted(name for name in await self._call("list_topics") if not name.startswith("__"))

    async def ensure(self, topics: Sequence[TopicSettings]) -> list[str]:
        """Make the topics that are missing; the names of the new ones.

        Raises:
            ConfigurationError: the broker refused one.
            BrokerUnavailable: no answer in time.
        """
        from aiokafka.admin import NewTopic

        brokers = len((await self._call("describe_cluster"))["brokers"])
        wanted = [
            NewTopic(t.name, t.partitions, t.copies or min(3, brokers), topic_configs=dict(t.config)) for t in topics
        ]
        response = await self._call("create_topics", wanted, int(self._timeout * 1000))
        refused = [answer for answer in response.topic_errors if answer[1] not in (_NO_ERROR, _EXISTS)]
        if refused:
            name, code, *message = refused[0]
            raise ConfigurationError(
                f"Kafka refused to make topic {name}: {(message or [None])[0] or f'error {code}'}.",
                cure="create it with the cluster's own tools, or grant the right to.",
            )
        return [answer[0] for answer in response.topic_errors if answer[1] == _NO_ERROR]

    async def committed(self, topic: str) -> dict[str, dict[int, int]]:
        """The next offsets that consumer groups have told Kafka of a topic, by group and partition.

        Raises:
            BrokerUnavailable: no answer in time.
        """
        found: dict[str, dict[int, int]] = {}
        for group, *_ in await self._call("list_consumer_groups"):
            offsets = await self._call("list_consumer_group_offsets", group)
            told = {tp.partition: at.offset for tp, at in offsets.items() if tp.topic == topic and at.offset >= 0}
            if told:
                found[group] = told
        return found

    async def close(self) -> None:
        """Disconnect; the next call connects again."""
        client, self._client = self._client, None
        if client is not None:
            await client.close()

    async def _call(self, method: str, *arguments: Any) -> Any:
        from aiokafka.errors import KafkaError

        async with self._using:
            try:
                async with asyncio.timeout(self._timeout):
                    client = await self._connected()
                    return await getattr(client, method)(*arguments)
            except (KafkaError, OSError, TimeoutError) as error:
                await self.close()
                raise unreachable(self._bootstrap, error) from error

    async def _connected(self) -> AIOKafkaAdminClient:
        from aiokafka.admin import AIOKafkaAdminClient

        if self._client is None:
            self._client = AIOKafkaAdminClient(**self._arguments, request_timeout_ms=int(self._timeout * 1000))
            await self._client.start()
        return self._client
