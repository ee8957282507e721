"""The registry's client against a real Apicurio Registry."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from soma_common.errors import (
    CodecError,
    ConfigurationError,
    IncompatibleSchema,
    RegistryUnavailable,
    SchemaNotFound,
)
from soma_common.events.payloads import Payload, to_json
from soma_common.retry import Backoff
from soma_common.schemas.avro import GENERIC, event_schema, event_schemas
from soma_common.schemas.avro_codec import AvroCodec
from soma_common.schemas.registry import Registry
from soma_common.schemas.rest import Patience
from soma_common.schemas.table import SchemaRef
from soma_common.testing.backends import PostgresHandle, RegistryHandle
from soma_common.testing.lane.apicurio import ApicurioServer
from tests.core_support import recorded

HASTY = Patience(timeout=10.0, attempts=2, backoff=Backoff(base=0.05, maximum=0.1))
MOMENT = datetime(2024, 1, 1, tzinfo=UTC)


class Order(Payload, event_type="order.placed"):
    number: int
    at: datetime


class OrderWithNote(Payload, event_type="order.placed"):
    number: int
    at: datetime
    note: str = ""


class OrderBroken(Payload, event_type="order.placed"):
    number: str
    at: datetime
    address: str


SCHEMAS = event_schemas([Order])


def _encode(codec: AvroCodec) -> bytes:
    event = recorded(Order(number=1, at=MOMENT))
    return codec.encode(event, to_json("payload", event.payload, 1000))


@pytest.fixture
def group() -> str:
    """A group of its own for each test."""
    return f"test-{uuid4().hex[:12]}"


async def test_resolve_registers_once_and_finds_again(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as first:
        await first.resolve(SCHEMAS)
        ids = [first.id_of("order.placed", 1), first.id_of(*GENERIC)]
        assert None not in ids
        assert len(set(ids)) == 2
    async with Registry(soma_registry.url, group=group) as second:
        await second.resolve(SCHEMAS, register=False)
        assert [second.id_of("order.placed", 1), second.id_of(*GENERIC)] == ids
        assert second.id_of("order.placed", 2) is None


async def test_many_that_register_the_same_at_once_agree(soma_registry: RegistryHandle, group: str) -> None:
    registries = [Registry(soma_registry.url, group=group) for _ in range(6)]
    await asyncio.gather(*(registry.resolve(SCHEMAS) for registry in registries))
    assert len({registry.id_of("order.placed", 1) for registry in registries}) == 1
    for registry in registries:
        await registry.close()
        await registry.close()


async def test_lookup_only_names_what_is_missing(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        with pytest.raises(SchemaNotFound, match="schemas push"):
            await registry.resolve(SCHEMAS, register=False)


async def test_an_unknown_writer_schema_is_fetched_once_for_many(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as writer, Registry(soma_registry.url, group=group) as reader:
        await writer.resolve(SCHEMAS)
        value = _encode(AvroCodec(writer))
        asked: list[str] = []
        original = reader._rest.send

        async def counted(method: str, path: str, body: object = None) -> object:
            asked.append(path)
            return await original(method, path, body)

        reader._rest.send = counted  # type: ignore[method-assign,assignment]
        codec = AvroCodec(reader)
        waiters = [asyncio.create_task(codec.ensure(value)) for _ in range(50)]
        await asyncio.sleep(0)
        waiters[0].cancel()  # whoever asked first and gives up does not take the answer from the others
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes if outcome is not None] == [asyncio.CancelledError]
        assert len(asked) == 1
        assert codec.decode(value) == AvroCodec(writer).decode(value)
        await codec.ensure(value)
        assert len(asked) == 1


async def test_content_and_global_ids_lead_to_the_same_schema(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        number = await registry.register("order.placed", 1, event_schema(Order))
        answer = await registry._rest.send("GET", f"/groups/{group}/artifacts/order.placed.v1/versions/branch=latest")
        global_id = answer.json()["globalId"]
        schema = await registry.fetch(SchemaRef("global", global_id))
        assert schema == await registry.fetch(SchemaRef("content", number)) == event_schema(Order)


async def test_an_id_that_is_not_there_is_remembered_for_a_while(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        for _ in range(2):
            with pytest.raises(SchemaNotFound, match="contentId 2000000000"):
                await registry.fetch(SchemaRef("content", 2_000_000_000))
        assert SchemaRef("content", 2_000_000_000) in registry._absent


async def test_a_compatible_change_is_a_new_version_and_old_records_stay_readable(
    soma_registry: RegistryHandle, group: str
) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        await registry.resolve(SCHEMAS)
        old = _encode(AvroCodec(registry))
        assert not await registry.check("order.placed", 1, event_schema(OrderWithNote))
        number = await registry.register("order.placed", 1, event_schema(OrderWithNote))
        assert number != int.from_bytes(old[1:5], "big")
        assert await registry.check("order.placed", 1, event_schema(OrderWithNote))
        back = AvroCodec(registry).decode(old)
        assert OrderWithNote.model_validate(back.payload) == OrderWithNote(number=1, at=MOMENT)


async def test_a_breaking_change_is_refused_and_the_fields_are_named(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        await registry.resolve(SCHEMAS)
        for attempt in (registry.check, registry.register):
            with pytest.raises(IncompatibleSchema) as caught:
                await attempt("order.placed", 1, event_schema(OrderBroken))
            assert set(caught.value.fields) == {"payload.number", "payload.address"}
            assert "payload.number: string cannot read long" in str(caught.value)
            assert "payload.address: new, and without a default" in str(caught.value)
        with pytest.raises(IncompatibleSchema):
            await registry.resolve({("order.placed", 1): event_schema(OrderBroken)})
        # The server itself says so too, not only our own comparison.
        answer = await registry._create(("order.placed", 1), _text(OrderBroken), dry_run=True)
        assert answer.json()["name"] == "RuleViolationException"


def _text(model: type[Payload]) -> str:
    from soma_common.schemas.avro import schema_text

    return schema_text(event_schema(model))


async def test_the_servers_reasons_become_field_paths(soma_registry: RegistryHandle, group: str) -> None:
    from soma_common.schemas.registry import _causes

    async with Registry(soma_registry.url, group=group) as registry:
        await registry.resolve(SCHEMAS)
        answer = await registry._create(("order.placed", 1), _text(OrderBroken), dry_run=True)
        causes = _causes(answer.json(), event_schema(OrderBroken))
        assert sorted(cause.split(":")[0] for cause in causes) == ["payload.address", "payload.number"]


async def test_the_global_rule_can_be_set_twice(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        await registry.set_global_rule()
        await registry.set_global_rule("BACKWARD")


async def test_an_address_without_a_registry_says_so(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(f"{soma_registry.url}/elsewhere", group=group) as registry:
        with pytest.raises(ConfigurationError, match="Apicurio"):
            await registry.resolve(SCHEMAS)


async def test_content_that_is_no_schema_is_a_codec_error(soma_registry: RegistryHandle, group: str) -> None:
    async with Registry(soma_registry.url, group=group) as registry:
        answer = await registry._create(("bad.content", 1), "{nope", dry_run=False)
        number = answer.json()["version"]["contentId"]
        with pytest.raises(CodecError, match="not an Avro record"):
            await registry.fetch(SchemaRef("content", number))
        with pytest.raises(CodecError):
            await AvroCodec(registry).ensure(b"\0" + number.to_bytes(4, "big"))


@pytest.fixture
def own_registry(soma_postgres: PostgresHandle) -> Iterator[ApicurioServer]:
    """A registry that this test may kill."""
    name = f"registry_{uuid4().hex[:12]}"
    server = ApicurioServer.start(soma_postgres.sql.create_database(name))
    yield server
    server.close()
    soma_postgres.sql.drop_database(name)


@asynccontextmanager
async def _registry(url: str, group: str, snapshot: Path) -> AsyncIterator[Registry]:
    async with Registry(url, group=group, snapshot=snapshot, patience=HASTY) as registry:
        yield registry


async def test_known_schemas_go_on_while_the_registry_is_away(
    own_registry: ApicurioServer, group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    snapshot = tmp_path / "schemas.json"
    async with _registry(own_registry.url, group, snapshot) as registry:
        await registry.resolve(SCHEMAS)
        codec = AvroCodec(registry)
        before = _encode(codec)
        own_registry.kill()
        # A running process: publishing and consuming of what is known.
        assert _encode(codec) == before
        assert codec.decode(before).payload == {"number": 1, "at": "2024-01-01T00:00:00Z"}
        await codec.ensure(before)
        with pytest.raises(RegistryUnavailable, match="after 2 attempts"):
            await codec.ensure(b"\0\0\0\x40\0")
    # A new process: the snapshot is enough for what it knows ...
    async with _registry(own_registry.url, group, snapshot) as registry:
        with caplog.at_level(logging.WARNING):
            await registry.resolve(SCHEMAS)
        assert "is away" in caplog.text
        assert _encode(AvroCodec(registry)) == before
        assert AvroCodec(registry).decode(before) == codec.decode(before)
        # ... and says what it does not know.
        with pytest.raises(RegistryUnavailable, match=r"order\.placed v1"):
            await registry.resolve(event_schemas([OrderWithNote]))
    # A damaged snapshot is as good as none.
    snapshot.write_bytes(snapshot.read_bytes()[:-20])
    async with _registry(own_registry.url, group, snapshot) as registry:
        with pytest.raises(RegistryUnavailable, match="No snapshot knows"):
            await registry.resolve(SCHEMAS)
        own_registry.start_again()
        await registry.resolve(SCHEMAS)
        assert _encode(AvroCodec(registry)) == before


async def test_a_registry_that_hangs_is_given_up_in_bounded_time(own_registry: ApicurioServer, group: str) -> None:
    patience = Patience(timeout=0.3, attempts=2, backoff=Backoff(base=0.01, maximum=0.02))
    async with Registry(own_registry.url, group=group, patience=patience) as registry:
        own_registry.pause()
        try:
            async with asyncio.timeout(30):
                with pytest.raises(RegistryUnavailable, match="Timeout"):
                    await registry.resolve(SCHEMAS)
        finally:
            own_registry.resume()


async def test_a_snapshot_that_cannot_be_written_is_a_warning(
    soma_registry: RegistryHandle, group: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    async with _registry(soma_registry.url, group, tmp_path / "file" / "schemas.json") as registry:
        with caplog.at_level(logging.WARNING):
            await registry.resolve(SCHEMAS)
        assert "cannot be written" in caplog.text
        assert registry.id_of("order.placed", 1) is not None


def test_httpx_and_fastavro_are_loaded_only_when_needed() -> None:
    code = (
        "import sys, soma_common.schemas.registry, soma_common.schemas.avro_codec as c;"
        "soma_common.schemas.registry.Registry('http://r');"
        "print([name for name in ('httpx', 'fastavro') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
