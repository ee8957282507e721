"""A world per test: fresh database, fresh topic, shared broker; and relay processes that never outlive their test."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from soma_common.testing.backends import KafkaHandle
from tests.integration.relay.lab import RelayProcess, World, world


@pytest.fixture(autouse=True)
def _quiet() -> None:
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


@pytest.fixture
async def lab(soma_database: str, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]) -> AsyncIterator[World]:
    topic = soma_topic()
    # Transactional ids belong to the cluster, which tests share: names are unique.
    async with world(soma_database, soma_kafka.bootstrap, topic, name=topic.rpartition(".")[2]) as one:
        yield one


@pytest.fixture
def spawn() -> Iterator[Callable[..., RelayProcess]]:
    started: list[RelayProcess] = []

    def start(*arguments: Any, **named: Any) -> RelayProcess:
        started.append(RelayProcess(*arguments, **named))
        return started[-1]

    yield start
    for process in started:
        process.close()
