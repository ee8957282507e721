"""Kafka's storage tool takes an id that begins with a dash for an option: one broker in 64 did not start."""

from __future__ import annotations

from soma_common.testing.lane.kafka import cluster_id


def test_an_id_never_begins_with_a_dash() -> None:
    ids = [cluster_id(bytes([first]) + bytes(15)) for first in range(256)]
    assert {len(one) for one in ids} == {22}
    assert not any(one.startswith("-") for one in ids)
