"""Two requests of the Kafka protocol, spoken by hand: is the broker ready, and create a topic.

A readiness probe must not depend on a client that retries and caches by itself, and fixtures must work without an
event loop. Request versions: Metadata 4, CreateTopics 4 (both served by Kafka 2.4 to 4.x).
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from soma_common.errors import ServerUnavailable

_METADATA, _CREATE_TOPICS = 3, 19
_VERSION = 4
_CLIENT = b"soma-lane"
_LONGEST = 64 * 1024 * 1024  # bytes; a longer answer is not Kafka speaking
# Answers that say "not yet": coordinator or controller still electing, not controller, request timed out.
_NOT_YET = {7, 14, 15, 16, 41}
_EXISTS = 36


@dataclass(frozen=True, slots=True)
class Topic:
    """A topic to create."""

    name: str
    partitions: int = 6
    replication: int = 1
    config: Mapping[str, str] = field(default_factory=dict)


def broker_count(bootstrap: str, *, within: float = 5.0) -> int:
    """How many brokers the cluster knows; 0 while it is not ready. Raises OSError when nothing answers."""
    answer = _call(bootstrap, _METADATA, struct.pack(">i?", 0, False), within)
    return int(struct.unpack_from(">ii", answer)[1])


def create_topic(bootstrap: str, topic: Topic, *, within: float = 30.0) -> None:
    """Create a topic; one that exists already is left alone. Raises ServerUnavailable with Kafka's error code."""
    deadline = time.monotonic() + within
    while (code := _create(bootstrap, topic, within)) in _NOT_YET and time.monotonic() < deadline:
        time.sleep(0.05)
    if code not in (0, _EXISTS):
        raise ServerUnavailable(f"Kafka refused to create the topic {topic.name!r}: error code {code}.")


def _create(bootstrap: str, topic: Topic, within: float) -> int:
    settings = b"".join(_string(key) + _string(value) for key, value in topic.config.items())
    body = struct.pack(">i", 1) + _string(topic.name) + struct.pack(">ih", topic.partitions, topic.replication)
    body += struct.pack(">ii", 0, len(topic.config)) + settings
    body += struct.pack(">i?", int(within * 1000), False)
    answer = _call(bootstrap, _CREATE_TOPICS, body, within)
    name_length = struct.unpack_from(">h", answer, 8)[0]
    return int(struct.unpack_from(">h", answer, 10 + name_length)[0])


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack(">h", len(encoded)) + encoded


def _call(bootstrap: str, api: int, body: bytes, within: float) -> bytes:
    host, _, port = bootstrap.split(",")[0].rpartition(":")
    header = struct.pack(">hhih", api, _VERSION, 1, len(_CLIENT)) + _CLIENT
    with socket.create_connection((host, int(port)), timeout=within) as connection:
        connection.sendall(struct.pack(">i", len(header + body)) + header + body)
        length = struct.unpack(">i", _read(connection, 4))[0]
        if not 4 <= length <= _LONGEST:
            raise OSError(f"{bootstrap} does not speak Kafka's protocol")
        return _read(connection, length)[4:]


def _read(connection: socket.socket, length: int) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        part = connection.recv(length - len(parts))
        if not part:
            raise ConnectionResetError("the broker closed the connection")
        parts += part
    return bytes(parts)
