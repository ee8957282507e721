"""The manifest of an archive: what it holds, and the checksums by which that can be told."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import orjson

from soma_common.errors import ArchiveCorrupt

FORMAT: Final = 1
NAME: Final = "manifest.json"
_SORTED = orjson.OPT_SORT_KEYS | orjson.OPT_INDENT_2


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchivedFile:
    """One Avro container file of ``size`` bytes, ordered by position; with its least and its greatest timestamp."""

    name: str
    events: int
    size: int
    sha256: str
    first_position: int
    last_position: int
    first_timestamp: datetime
    last_timestamp: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What an archive holds: the events of some types of one partition of one log.

    Args:
        lower_position, upper_position: the partition, the upper bound excluded.
        whole: all that the partition held when it was archived.
        counts: events by type.
        tick_id: the tick of the log that shows all of them.
        library: version of soma-common that wrote it.
        schema_version: number of the newest migration of the database.
    """

    archive_id: UUID
    log_id: UUID
    lower_position: int
    upper_position: int
    whole: bool
    counts: Mapping[str, int]
    files: tuple[ArchivedFile, ...]
    tick_id: int
    library: str
    schema_version: int
    made_by: str
    made_at: datetime

    @property
    def events(self) -> int:
        """How many events there are."""
        return sum(file.events for file in self.files)

    @property
    def size(self) -> int:
        """The bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def first_position(self) -> int:
        """The position of the first event."""
        return self.files[0].first_position

    @property
    def last_position(self) -> int:
        """The position of the last event."""
        return self.files[-1].last_position

    @property
    def first_timestamp(self) -> datetime:
        """The least timestamp."""
        return min(file.first_timestamp for file in self.files)

    @property
    def last_timestamp(self) -> datetime:
        """The greatest timestamp."""
        return max(file.last_timestamp for file in self.files)

    def to_bytes(self) -> bytes:
        """As it is stored: JSON with a digest of itself."""
        given: dict[str, Any] = {"format": FORMAT, **asdict(self)}
        return orjson.dumps(given | {"digest": _digest(given)}, option=_SORTED)

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """The manifest that ``to_bytes`` wrote.

        Raises:
            ArchiveCorrupt: it is something else, was changed, or of another format.
        """
        try:
            given = orjson.loads(data)
            told = given.pop("digest")
            number = given.pop("format")
        except (orjson.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
            raise ArchiveCorrupt(f"{data[:60]!r} is no manifest of an archive.", cure=_CURE) from error
        if number != FORMAT:
            raise ArchiveCorrupt(f"The archive has format {number!r:.20}.", cure="read it with a newer soma-common.")
        if told != _digest({"format": FORMAT, **given}):
            raise ArchiveCorrupt("The manifest was changed after it was written.", cure=_CURE)
        try:
            return cls._of(given)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise ArchiveCorrupt(f"The manifest lacks something: {error!r:.100}.", cure=_CURE) from error

    @classmethod
    def _of(cls, given: dict[str, Any]) -> Manifest:
        files = tuple(
            ArchivedFile(**(file | _times(file, "first_timestamp", "last_timestamp"))) for file in given["files"]
        )
        made = cls(
            **(given | {"files": files, "archive_id": UUID(given["archive_id"]), "log_id": UUID(given["log_id"])}
               | _times(given, "made_at"))
        )  # fmt: skip
        if not files or sum(made.counts.values()) != made.events or any("/" in file.name for file in files):
            raise ValueError("counts or files")
        return made


_CURE: Final = "take the archive from a copy; `somastack retention archives verify` tells which are whole."


def _times(given: Mapping[str, Any], *names: str) -> dict[str, datetime]:
    return {name: datetime.fromisoformat(given[name]).astimezone(UTC) for name in names}


def _digest(given: Mapping[str, Any]) -> str:
    return hashlib.sha256(orjson.dumps(given, option=orjson.OPT_SORT_KEYS)).hexdigest()
