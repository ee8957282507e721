"""Lists reach PostgreSQL through psycopg as literals: every value comes back as it was."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import psycopg
import pytest

from soma_common.postgres.arrays import array_literal
from soma_common.postgres.sync import fetch_sync


class _Kind(str, Enum):  # noqa: UP042 - StrEnum would hide the trap
    A = "a, or b"


TEXTS = [
    "",
    "NULL",
    "null",
    'a"b',
    "a\\b",
    "{",
    "}",
    ",",
    " x ",
    "\n\t",
    "é😀",
    None,
    '\\\\"',
    "{}",
    "\x01\x7f\u2028",
    "'",
]
CASES: dict[str, list[Any]] = {
    "text": TEXTS,
    "bytea": [b"", b"\\", bytes(range(256)), None],
    "bigint": [1, -5, None, 2**62],
    "uuid": [uuid.uuid4(), None],
    "timestamptz": [datetime.now(UTC), None, datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)],
    "boolean": [True, False, None],
}


@pytest.mark.parametrize("kind", CASES)
def test_values_come_back_as_they_were(kind: str, soma_database: str) -> None:
    with psycopg.connect(soma_database) as connection:
        for values in (CASES[kind], [], [None]):
            assert fetch_sync(connection, f"SELECT $1::{kind}[]", [values]) == [(values,)]


def test_an_enum_of_text_is_its_text() -> None:
    assert array_literal([_Kind.A]) == '{"a, or b"}'


def test_buffers_are_bytes() -> None:
    assert array_literal([bytearray(b"\x01"), memoryview(b"\xff")]) == '{"\\\\x01","\\\\xff"}'
