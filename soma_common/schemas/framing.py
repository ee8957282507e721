"""How a record names the schema it was written with, as Apicurio's serializers do.

- in the value: a zero byte, then the id as 4 bytes (what the library writes, and the default of Apicurio 3), or as 8;
- in the headers: ``apicurio.value.contentId`` or ``apicurio.value.globalId``, 8 bytes; the value is Avro alone.

Ids begin at 1, so four zero bytes after the magic can only be the upper half of an 8-byte id: both widths are told
apart by looking. Whether an id in a value is a contentId or a globalId cannot be seen: the reader is told.
"""

from __future__ import annotations

from collections.abc import Mapping

from soma_common.errors import CodecError
from soma_common.schemas.table import Kind, SchemaRef

CONTENT_ID_HEADER = "apicurio.value.contentId"
GLOBAL_ID_HEADER = "apicurio.value.globalId"
ENCODING_HEADER = "apicurio.value.encoding"

_CURE = "look at the record's content-type header and its producer."


def frame_prefix(content_id: int) -> bytes:
    """The five bytes before the Avro data.

    Raises:
        CodecError: the id is not in 1 .. 2**32 - 1.
    """
    if not 0 < content_id < 1 << 32:
        raise CodecError(f"contentId {content_id} does not fit into 4 bytes.")
    return b"\0" + content_id.to_bytes(4, "big")


def unframe(value: bytes, headers: Mapping[str, bytes] | None, kind: Kind) -> tuple[SchemaRef, int]:
    """The schema of a record, and where its Avro data begins.

    Raises:
        CodecError: there is no frame here; the message says what was seen.
    """
    if headers:
        named = _from_headers(headers)
        if named is not None:
            return named, 0
    if len(value) < 5 or value[0] != 0:
        raise CodecError(f"These {len(value)} bytes begin with {value[:5].hex()!r}, not with a schema id.", cure=_CURE)
    short = int.from_bytes(value[1:5], "big")
    if short:
        return SchemaRef(kind, short), 5
    long = int.from_bytes(value[1:9], "big", signed=True)
    if len(value) < 9 or long < 1:
        raise CodecError(f"These {len(value)} bytes name the schema id {short}, which cannot be.", cure=_CURE)
    return SchemaRef(kind, long), 9


def _from_headers(headers: Mapping[str, bytes]) -> SchemaRef | None:
    kinds: tuple[tuple[str, Kind], ...] = ((CONTENT_ID_HEADER, "content"), (GLOBAL_ID_HEADER, "global"))
    for name, kind in kinds:
        raw = headers.get(name)
        if raw is None:
            continue
        number = int.from_bytes(raw, "big", signed=True)
        if len(raw) not in (4, 8) or number < 1:
            raise CodecError(f"The header {name} holds {raw[:16].hex()!r}, not a schema id.", cure=_CURE)
        if headers.get(ENCODING_HEADER, b"BINARY") != b"BINARY":
            raise CodecError(f"The record is Avro in {headers[ENCODING_HEADER][:20]!r}, not in binary.", cure=_CURE)
        return SchemaRef(kind, number)
    return None
