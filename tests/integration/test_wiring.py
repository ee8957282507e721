"""What an open application makes, it gives back."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from soma_common import DeployMode, Event, PayloadModels, Soma, SomaConfig, SomaError
from soma_common.errors import ConfigurationError
from soma_common.testing.backends import KafkaHandle
from soma_common.wiring import open_ground
from tests.waiting import until


async def test_a_relay_of_the_application_leaves_no_connection_open(
    soma_database: str, soma_kafka: KafkaHandle, soma_topic: Callable[..., str]
) -> None:
    topic = soma_topic()
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, postgres_dsn=soma_database, kafka_bootstrap=soma_kafka.bootstrap, topic=topic
    )
    await _relay_one_event(config, topic)
    await asyncio.sleep(0)
    gc.collect()  # an open connection would warn here, and a warning is an error


async def _relay_one_event(config: SomaConfig, topic: str) -> None:
    ground = await open_ground(config, PayloadModels(), lambda _: topic)
    await ground.store.publish(Event(payload={}, tenant_id="t", aggregate_id="a", event_type="thing.done"))
    relay = ground.relay()
    async with relay:

        async def relayed() -> bool:
            return relay.stats().relayed == 1

        await until(relayed)
    await ground.close()


async def test_the_applications_token_reaches_the_registry(soma_database: str, tmp_path: Path) -> None:
    seen: list[str] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        seen.extend(line for line in head.lower().split("\r\n") if line.startswith("authorization"))
        writer.write(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
        config = SomaConfig.from_env(
            {
                "SOMA_DEPLOY_MODE": "somastack",
                "SOMA_FOLDER": str(tmp_path),
                "SOMASTACK_POSTGRES_DSN": soma_database,
                "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:1",
                "SOMASTACK_REGISTRY_URL": f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
                "SOMASTACK_REGISTRY_TOKEN": "let-me-in",
            }
        )
        assert "let-me-in" not in repr(config)
        with pytest.raises(SomaError):
            await open_ground(config, PayloadModels(), lambda _: "topic")
    assert set(seen) == {"authorization: bearer let-me-in"}


@pytest.mark.parametrize("mode", [DeployMode.STANDALONE, DeployMode.SOMASTACK])
async def test_a_synchronous_store_writes_what_the_relay_of_the_mode_wants(
    soma_database: str, mode: DeployMode
) -> None:
    config = SomaConfig(mode=mode, service_id="shop", postgres_dsn=soma_database, kafka_bootstrap="h:1", topic="usual")
    store = Soma(config, topics={"thing.moved": "moves"}).sync_store()  # a running loop is no hindrance
    with psycopg.connect(soma_database) as connection:
        for kind in ("thing.done", "thing.moved"):
            store.publish(Event(payload={}, tenant_id="t", aggregate_id="a", event_type=kind), connection)
        rows = connection.execute("SELECT topic FROM soma.outbox ORDER BY position").fetchall()
    assert rows == ([] if mode is DeployMode.STANDALONE else [("usual",), ("moves",)])


async def test_a_folder_that_cannot_be_made_is_named(soma_database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    config = SomaConfig(
        mode=DeployMode.SOMASTACK, postgres_dsn=soma_database, kafka_bootstrap="h:1",
        registry_url="http://127.0.0.1:1", folder=tmp_path / "file" / "soma",
    )  # fmt: skip
    with pytest.raises(ConfigurationError, match="SOMA_FOLDER"):
        await open_ground(config, PayloadModels(), lambda _: "topic")
