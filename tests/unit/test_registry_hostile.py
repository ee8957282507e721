"""A server that is no registry, or a bad one: named errors, bounded time and memory, nothing followed."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from soma_common.errors import CodecError, ConfigurationError, RegistryUnavailable, SomaError
from soma_common.retry import Backoff
from soma_common.schemas.address import RegistryAuth
from soma_common.schemas.avro import event_schemas, generic_schema
from soma_common.schemas.registry import Registry
from soma_common.schemas.rest import MAX_ANSWER_BYTES, Patience
from soma_common.schemas.table import SchemaRef

HASTY = Patience(timeout=1.0, attempts=2, backoff=Backoff(base=0.01, maximum=0.02))


def _answer(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


@asynccontextmanager
async def _peer(answer: bytes, seen: list[str]) -> AsyncIterator[str]:
    """A TCP peer on loopback that answers every request with the same bytes and notes the requests."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append((await reader.readuntil(b"\r\n\r\n")).decode("latin-1"))
        writer.write(answer)
        try:
            await writer.drain()
        except ConnectionError:
            return  # the client had enough of it, which is what some tests want
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("answer", "error", "requests"),
    [
        (_answer("302 Found", b"", "location: http://127.0.0.1:1/"), ConfigurationError, 1),
        (_answer("401 Unauthorized"), ConfigurationError, 1),
        (_answer("403 Forbidden"), ConfigurationError, 1),
        (_answer("404 Not Found", b"<html>"), ConfigurationError, 1),
        (_answer("500 Oops", b"no database"), RegistryUnavailable, 2),
        (_answer("429 Slow down"), RegistryUnavailable, 2),
        (_answer("200 OK", b"x" * (MAX_ANSWER_BYTES + 1)), CodecError, 1),
        (b"nonsense\r\n\r\n", RegistryUnavailable, 2),
        (b"", RegistryUnavailable, 2),
    ],
)
async def test_bad_answers_have_named_errors(answer: bytes, error: type[SomaError], requests: int) -> None:
    seen: list[str] = []
    async with _peer(answer, seen) as url, Registry(url, patience=HASTY) as registry:
        with pytest.raises(error):
            await registry.resolve(event_schemas([]))
        assert len(seen) == requests


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{}",
        b'{"versions": 5}',
        b'{"versions": [[]]}',
        b'{"versions": [{"contentId": "x"}]}',
        b"\xff",
        b"[" * 9999,
    ],
)
async def test_answers_of_another_shape_are_refused(body: bytes) -> None:
    async with _peer(_answer("200 OK", body), []) as url, Registry(url, patience=HASTY) as registry:
        with pytest.raises(ConfigurationError, match="Apicurio"):
            await registry.resolve(event_schemas([]))
        with pytest.raises(ConfigurationError):
            await registry.check("", 0, generic_schema())


async def test_a_404_of_another_server_is_not_taken_for_a_missing_schema() -> None:
    async with _peer(_answer("404 Not Found", b"<html>"), []) as url, Registry(url, patience=HASTY) as registry:
        with pytest.raises(ConfigurationError):
            await registry.fetch(SchemaRef("content", 1))


@pytest.mark.parametrize(
    ("auth", "header"),
    [
        (RegistryAuth(token="abc"), "Bearer abc"),
        (RegistryAuth(username="u", password="p"), "Basic " + base64.b64encode(b"u:p").decode()),
        (None, None),
    ],
)
async def test_credentials_go_into_the_header_and_nowhere_else(auth: RegistryAuth | None, header: str | None) -> None:
    seen: list[str] = []
    async with _peer(_answer("401 Unauthorized"), seen) as url, Registry(url, auth=auth, patience=HASTY) as registry:
        with pytest.raises(ConfigurationError, match="credentials") as caught:
            await registry.fetch(SchemaRef("content", 1))
        found = [line.split(": ", 1)[1] for line in seen[0].split("\r\n") if line.lower().startswith("authorization")]
        assert found == ([header] if header else [])
        assert "abc" not in str(caught.value)
