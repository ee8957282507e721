"""How rows are divided, where cursors stop, and which of two cursors is further."""

from __future__ import annotations

from typing import Any

import pytest

from soma_common.config import KafkaSecurity
from soma_common.errors import ConfigurationError
from soma_common.kafka.clients import client_arguments
from soma_common.outbox.groups import Batch, divide, later
from soma_common.outbox.publishing import Sending
from soma_common.outbox.queue import Aside, Page
from soma_common.outbox.relay import Relay, identities
from soma_common.postgres.cursor import Cursor, Diff, Tick
from soma_common.postgres.pool import Pool

BASE = Tick(1, 11, "10:10:", 0, 5, 1)
TARGET = Tick(2, 22, "20:20:", 5, 100, 1)


def row(position: int, *, topic: str = "t", key: bytes = b"k", shard: int = 0) -> tuple[Any, ...]:
    return (position, shard, topic, key, "id", "type", 1, 0, b"value", "{}", shard)


def page(*rows: tuple[Any, ...], full: bool = False) -> Page:
    return Page(Diff(BASE, TARGET, 0), rows, full)


def test_rows_go_through_untouched_when_nothing_is_wrong() -> None:
    rows = [row(1), row(2)]
    assert divide(rows, {}, {}, {0: set()}) == (rows, [])


def test_a_refused_row_takes_the_later_rows_of_its_key_along() -> None:
    rows = [row(1), row(2), row(3, key=b"other"), row(4), row(5, topic="u")]
    send, asides = divide(rows, {}, {2: "too large"}, {0: set()})
    assert [r[0] for r in send] == [1, 3, 5]
    assert asides == [Aside(0, 2, "too large"), Aside(0, 4, None)]


def test_a_refused_topic_and_a_blocked_key() -> None:
    rows = [row(1, topic="bad"), row(2), row(3, key=b"other")]
    send, asides = divide(rows, {"bad": "unknown"}, {}, {0: {("t", b"k")}})
    assert [r[0] for r in send] == [3]
    assert asides == [Aside(0, 1, "unknown"), Aside(0, 2, None)]


def test_cursors_stop_before_the_first_unsent_row_of_each_group() -> None:
    batch = Batch({0: page(row(6), row(7), row(9)), 1: page(row(8, shard=1), full=True)})
    assert batch.ends() == {0: Cursor(2, 22), 1: Cursor(1, 11, 2, 22, 8)}
    assert batch.acknowledged([row(7), row(9)]) == {0: Cursor(1, 11, 2, 22, 6), 1: Cursor(1, 11, 2, 22, 8)}
    assert batch.acknowledged([row(6)])[0] == Cursor(1, 11, 2, 22, 0)
    assert batch.reached(0, [row(7)]) == 6
    assert batch.reached(1, [row(7)]) == 8


def test_the_later_cursor() -> None:
    chain = [Cursor(), Cursor(0, 0, 3, 3, 0), Cursor(0, 0, 3, 3, 9), Cursor(3, 3), Cursor(3, 3, 5, 5, 2), Cursor(5, 5)]
    for place, first in enumerate(chain):
        for second in chain[place:]:
            assert later(first, second) == later(second, first) == second


def test_identities_belong_to_groups() -> None:
    assert identities("shop") == [f"soma-relay-shop-{group}" for group in range(8)]


def test_no_relay_beside_debezium() -> None:
    with pytest.raises(ConfigurationError, match="external"):
        Relay(Pool("postgresql://nowhere"), None, outbox="external")  # type: ignore[arg-type]


def test_portions_are_empty_by_default() -> None:
    assert Sending([], {}).portions == {}


def test_arguments_of_kafka_clients() -> None:
    assert client_arguments("a:1, b:2") == {"bootstrap_servers": ["a:1", "b:2"], "security_protocol": "PLAINTEXT"}
    sasl = KafkaSecurity(protocol="SASL_PLAINTEXT", mechanism="SCRAM-SHA-512", username="u", password="p")
    assert client_arguments("a:1", sasl)["sasl_plain_password"] == "p"
    with pytest.raises(ConfigurationError, match="user and a password"):
        client_arguments("a:1", KafkaSecurity(protocol="SASL_SSL"))
    with pytest.raises(ConfigurationError, match="CA_FILE"):
        client_arguments("a:1", KafkaSecurity(protocol="SSL", ca_file="/no/such/file"))
    with pytest.raises(ConfigurationError, match="No Kafka address"):
        client_arguments("")
