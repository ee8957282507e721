"""Which reader the value of a letter goes to."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from uuid import UUID

import orjson
import pytest

from soma_common.dlq.decoding import event_of
from soma_common.dlq.models import FullLetter, Known, Letter, RawRecord, Status
from soma_common.errors import CodecError
from soma_common.events.codec import JsonCodec
from soma_common.events.models import RecordedEvent
from tests.core_support import recorded

EVENT = recorded({"n": 1})
ENVELOPE = JsonCodec().encode(EVENT, orjson.dumps(EVENT.payload))
NOW = datetime(2024, 1, 1, tzinfo=UTC)
RECORD = RawRecord(
    topic="t", partition=0, offset=1, key=b"k", value=b"\0\0\0\0\1", headers=(("soma_version", b"3"), ("h", None))
)
LETTER = FullLetter(
    letter=Letter(
        place=1, letter_id=UUID(int=1), consumer="billing", sequence=b"s", status=Status.DEAD, stage=None, topic="t",
        partition=0, offset=1, event=Known(event_id=EVENT.event_id), error_type=None, message=None, fingerprint=None,
        attempts=1, next_at=None, automatic_left=0, edited_by="ann", edited_at=NOW, revision=1, parked_at=NOW,
        changed_at=NOW, size=1,
    ),
    record=RECORD, message=None, stack=None, edited_value=None,
)  # fmt: skip


class TheSources(Exception):
    """The consumer's own reader was asked."""


async def asked(record: RawRecord) -> RecordedEvent:
    raise TheSources(record.value)


@pytest.mark.parametrize("before", [b"", b" \n\t"])
async def test_an_edited_json_object_is_the_envelope(before: bytes) -> None:
    event = await event_of(replace(LETTER, edited_value=before + ENVELOPE), asked)
    assert event == replace(EVENT, version=3)


async def test_a_broken_json_object_says_so() -> None:
    with pytest.raises(CodecError, match="not a soma event in JSON"):
        await event_of(replace(LETTER, edited_value=ENVELOPE[:-1]), asked)


async def test_all_else_is_the_consumers() -> None:
    keyless = replace(RECORD, key=None)
    for letter, value in (
        (LETTER, RECORD.value),
        (replace(LETTER, record=replace(RECORD, value=ENVELOPE)), ENVELOPE),
        (replace(LETTER, edited_value=b"\0\0\0\0\2"), b"\0\0\0\0\2"),
        (replace(LETTER, edited_value=b"[]"), b"[]"),
        (replace(LETTER, record=keyless, edited_value=ENVELOPE), ENVELOPE),
    ):
        with pytest.raises(TheSources) as error:
            await event_of(letter, asked)
        assert error.value.args == (value,)
