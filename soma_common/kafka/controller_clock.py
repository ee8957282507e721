"""What time it is at the controller of a Kafka cluster, told without writing anything.

A controller says of each voter when it last heard of it, and of itself "now" (KIP-595 and KIP-836, DescribeQuorum
version 1; brokers since 3.3 pass the question on). The request is ours because aiokafka has none.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from aiokafka.errors import IncompatibleBrokerVersion
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.types import CompactArray, CompactString, Int16, Int32, Int64, Schema, TaggedFields

_QUORUM, _VERSION = 55, 1
_TEXT = CompactString("utf-8")
_REPLICAS = CompactArray(
    ("replica", Int32), ("end", Int64), ("fetched", Int64), ("caught_up", Int64), ("tags", TaggedFields)
)


class _Answer(Response):  # type: ignore[misc]  # aiokafka has no types
    API_KEY = _QUORUM
    API_VERSION = _VERSION
    SCHEMA = Schema(
        ("error_code", Int16),
        (
            "topics",
            CompactArray(
                ("name", _TEXT),
                (
                    "partitions",
                    CompactArray(
                        ("partition", Int32),
                        ("error_code", Int16),
                        ("leader", Int32),
                        ("epoch", Int32),
                        ("high", Int64),
                        ("voters", _REPLICAS),
                        ("observers", _REPLICAS),
                        ("tags", TaggedFields),
                    ),
                ),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _Struct(RequestStruct):  # type: ignore[misc]
    API_KEY = _QUORUM
    API_VERSION = _VERSION
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _Answer
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(
                ("name", _TEXT),
                ("partitions", CompactArray(("partition", Int32), ("tags", TaggedFields))),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _Question(Request[_Struct]):  # type: ignore[misc]
    API_KEY = _QUORUM

    def build(self, request_struct_class: type[_Struct]) -> _Struct:
        return request_struct_class([("__cluster_metadata", [(0, {})], {})], {})


async def controller_time(client: Any) -> datetime | None:
    """The controller's clock, to the millisecond; None when the cluster does not tell it.

    Args:
        client: aiokafka's client, connected.

    Raises:
        KafkaError: no broker answers.
    """
    node = client.get_random_node()
    if node is None:
        return None
    try:
        answer = await client.send(node, _Question())
    except (IncompatibleBrokerVersion, NotImplementedError):
        return None
    for topic in answer.topics if answer.error_code == 0 else ():
        for _, code, leader, _, _, voters, *_ in topic[1]:
            told = [voter[3] for voter in voters if voter[0] == leader and voter[3] > 0]
            if code == 0 and told:
                return datetime.fromtimestamp(told[0] / 1000, UTC)
    return None
