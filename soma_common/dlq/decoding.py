"""The event that a letter's next try works with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

from soma_common.dlq.models import FullLetter, RawRecord
from soma_common.events.codec import JsonCodec, placed
from soma_common.events.models import RecordedEvent

Decode = Callable[[RawRecord], Awaitable[RecordedEvent]]

_JSON = JsonCodec()


async def event_of(letter: FullLetter, decode: Decode) -> RecordedEvent:
    """The event in a letter's value; ``decode`` reads the records of its consumer.

    An edited value that begins as a JSON object does is the JSON envelope, whatever the consumer's codec is: people
    edit text, and a frame of Avro begins with a zero byte.

    Raises:
        CodecError: there is none in it.
        InfrastructureError: its schema cannot be had now.
    """
    kept, edited = letter.record, letter.edited_value
    # Where there is no key the source says what it does about that.
    if edited is None or kept.key is None or not edited.lstrip().startswith(b"{"):
        return await decode(replace(kept, value=letter.value))
    return placed(_JSON.decode(edited), {name: value or b"" for name, value in kept.headers})
