"""A TCP proxy on loopback that cuts connections at will, and at the one moment that matters: around COMMIT.

It runs in a thread with an event loop of its own, so that synchronous and asynchronous tests steer it alike.
"""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit, urlunsplit

from soma_common.errors import ServerUnavailable
from soma_common.testing.lane.ports import LOOPBACK

_CHUNK = 64 * 1024
_COMMIT = b"COMMIT"
_TURNS = 5  # of the loop, from the accepted socket to the task that serves it
_T = TypeVar("_T")


class CommitCut(Enum):
    """When to cut a connection whose client sends COMMIT."""

    NEVER = "never"
    BEFORE = "before"  # the server never sees the COMMIT: the transaction is rolled back
    AFTER = "after"  # the server commits and answers; the answer is dropped: the client cannot know


@dataclass(eq=False, slots=True)
class _Link:
    """One client's connection and the server's side of it."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    doomed: bool = False  # the next answer of the server is swallowed and the connection cut
    silent: bool = False  # nothing goes through any more, and nobody is told

    def cut(self) -> None:
        for side in (self.client, self.server):
            side.transport.abort()  # a reset, as from a machine that vanished, not an orderly end


class Proxy:
    """Forwards ``address`` to ``host:port`` until told otherwise; a context manager, steered from any
    thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="soma-proxy", daemon=True)
        self._links: set[_Link] = set()
        self._refusing = False
        self._commit_cut = CommitCut.NEVER
        self._commit_cuts_left = 0
        self._commit_cuts = 0
        self._thread.start()
        self._server = self._call(self._listen)

    @property
    def port(self) -> int:
        """The port to connect to, on 127.0.0.1."""
        return int(self._server.sockets[0].getsockname()[1])

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self.port}"

    def through(self, dsn: str) -> str:
        """The DSN of the same database by way of this proxy; not encrypted, so that a COMMIT can be told."""
        parts = urlsplit(dsn)
        user, at, _ = parts.netloc.rpartition("@")
        query = "&".join(filter(None, (parts.query, "sslmode=disable")))
        return urlunsplit(parts._replace(netloc=f"{user}{at}{self.address}", query=query))

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._links)

    @property
    def commit_cuts(self) -> int:
        """How many connections have been cut at a COMMIT so far."""
        return self._commit_cuts

    def cut(self) -> int:
        """Reset every open connection; new ones are served. Returns how many were cut."""
        return self._call(self._cut)

    def silence(self) -> int:
        """Let nothing through the open connections any more, as a firewall that forgot them: they stay open, and what
        is sent is lost. New ones are served. Returns how many there are.
        """
        return self._call(self._silence)

    def refuse(self) -> int:
        """Reset every open connection and every new one until ``forward``. Returns how many were cut."""
        self._refusing = True
        return self.cut()

    def forward(self) -> None:
        """Serve new connections again."""
        self._refusing = False

    def cut_at_commit(self, when: CommitCut, *, times: int = 1) -> None:
        """Cut the next ``times`` connections whose client sends COMMIT to PostgreSQL."""
        self._commit_cut, self._commit_cuts_left = when, times

    def close(self) -> None:
        """End the proxy and every connection. Twice is safe."""
        if self._thread.is_alive():
            self._call(self._shut)
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(10)
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, what: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        return asyncio.run_coroutine_threadsafe(what(), self._loop).result(10)

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, LOOPBACK, 0)

    async def _cut(self) -> int:
        links = list(self._links)
        for link in links:
            link.cut()
        return len(links)

    async def _silence(self) -> int:
        for link in self._links:
            link.silent = True
        return len(self._links)

    async def _shut(self) -> None:
        self._server.close()
        for _ in range(_TURNS):  # whoever was accepted this very moment is known as a link then
            await asyncio.sleep(0)
        await self._cut()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            writer.transport.abort()
            return
        try:
            answers, requests = await asyncio.open_connection(*self._target)
        except OSError:  # the server is away: its client learns it as it would without us
            writer.transport.abort()
            return
        except asyncio.CancelledError:  # the proxy ends meanwhile
            writer.transport.abort()
            raise
        link = _Link(writer, requests)
        self._links.add(link)
        try:
            await self._carry(link, reader, answers)
        finally:
            link.cut()
            self._links.discard(link)

    async def _carry(self, link: _Link, requests: asyncio.StreamReader, answers: asyncio.StreamReader) -> None:
        """Both directions, until either ends."""
        there = asyncio.create_task(self._carry_requests(link, requests))
        back = asyncio.create_task(self._carry_answers(link, answers))
        try:
            await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (there, back):
                task.cancel()
            await asyncio.gather(there, back, return_exceptions=True)

    async def _carry_requests(self, link: _Link, requests: asyncio.StreamReader) -> None:
        watcher = CommitWatcher()
        with suppress(ConnectionError):
            while data := await requests.read(_CHUNK):
                if link.silent:
                    continue
                if watcher.feed(data) and self._commit_cuts_left > 0:
                    self._commit_cuts_left -= 1
                    self._commit_cuts += 1
                    if self._commit_cut is CommitCut.BEFORE:
                        return
                    link.doomed = True
                link.server.write(data)
                await link.server.drain()

    async def _carry_answers(self, link: _Link, answers: asyncio.StreamReader) -> None:
        with suppress(ConnectionError):
            while (data := await answers.read(_CHUNK)) and not link.doomed:
                if link.silent:
                    continue
                link.client.write(data)
                await link.client.drain()


class CommitWatcher:
    """Finds COMMIT in what a PostgreSQL client sends: a simple Query or the Parse of a prepared statement.

    Messages are followed by their length fields, so a COMMIT inside data or a longer statement is not one,
    and one split over two packets is. An encrypted connection is not understood: use ``sslmode=disable``.
    """

    __slots__ = ("_buffer", "_started")

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._started = False

    def feed(self, data: bytes) -> bool:
        """True when ``data`` completes a message that says COMMIT."""
        self._buffer += data
        found = False
        while (message := self._next()) is not None:
            found = found or _says_commit(message)
        return found

    def _next(self) -> bytes | None:
        head = 1 if self._started else 0  # the first message of a connection has no type byte
        if len(self._buffer) < head + 4:
            return None
        length = head + int(struct.unpack_from(">i", self._buffer, head)[0])
        if len(self._buffer) < length:
            return None
        message = bytes(self._buffer[:length])
        del self._buffer[:length]
        self._started = self._started or not _negotiates(message)
        return message if head else b""


def _negotiates(message: bytes) -> bool:
    """SSLRequest and GSSENCRequest come before the real start-up message."""
    return len(message) == 8 and struct.unpack_from(">i", message, 4)[0] in (
        80877103,
        80877104,
    )


def _says_commit(message: bytes) -> bool:
    if message[:1] == b"Q":
        text = message[5:]
    elif message[:1] == b"P":
        text = message[5:].split(b"\0", 1)[-1]
    else:
        return False
    return text.split(b"\0", 1)[0].strip().rstrip(b";").strip().upper() in (
        _COMMIT,
        b"END",
        b"COMMIT TRANSACTION",
    )


def proxy_to(dsn_or_address: str) -> Proxy:
    """A proxy before ``host:port`` or the server of a ``postgresql://`` DSN. Raises ServerUnavailable if
    unclear.
    """
    place = dsn_or_address.rsplit("@", 1)[-1].split("/", 1)[0]
    host, _, port = place.rpartition(":")
    if not host or not port.isdigit():
        raise ServerUnavailable(f"No host and port in {place!r}.", cure="pass host:port or a DSN with both.")
    return Proxy(host, int(port))
