"""Schemas and their ids, in memory and in a snapshot file that outlives the registry's absences."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

from soma_common.errors import SchemaNotFound

logger = logging.getLogger(__name__)

Kind = Literal["content", "global"]
_FORMAT = 1


class SchemaRef(NamedTuple):
    """Names a schema in the registry: a ``contentId`` or a ``globalId``, both 1 or more."""

    kind: Kind
    id: int

    def __str__(self) -> str:
        return f"{self.kind}Id {self.id}"


class SchemaTable:
    """What is known without asking: schemas by id, content ids by schema text, ids by (event type, version).

    Also the ``SchemaIds`` of a codec that never asks a registry.
    """

    def __init__(self) -> None:
        self._schemas: dict[SchemaRef, Any] = {}
        self._ids: dict[str, int] = {}
        self._types: dict[tuple[str, int], int] = {}

    def id_of(self, event_type: str, version: int) -> int | None:
        """The content id that this event type and version is written with, or None."""
        return self._types.get((event_type, version))

    def schema_of(self, ref: SchemaRef) -> Any | None:
        """The schema behind an id, or None."""
        return self._schemas.get(ref)

    async def fetch(self, ref: SchemaRef) -> Any:
        """The same as ``schema_of``: this table has nobody to ask.

        Raises:
            SchemaNotFound: the id is not in the table.
        """
        found = self.schema_of(ref)
        if found is None:
            raise SchemaNotFound(f"No schema has {ref}.")
        return found

    def content_id(self, text: str) -> int | None:
        """The content id of a schema's text, when it was seen before."""
        return self._ids.get(_digest(text))

    def learn(self, ref: SchemaRef, text: str) -> Any:
        """Keep a schema under an id, and return it parsed. The text must be JSON."""
        schema = json.loads(text)
        self._schemas[ref] = schema
        if ref.kind == "content":
            self._ids[_digest(text)] = ref.id
        return schema

    def bind(self, event_type: str, version: int, content_id: int) -> None:
        """From now on, write this event type and version with this id."""
        self._types[event_type, version] = content_id

    def save(self, path: Path, source: str) -> None:
        """Write everything to a file, atomically: a reader sees the old file or the new one. May raise OSError."""
        document = {
            "format": _FORMAT,
            "source": source,
            "ids": self._ids,
            "schemas": [[ref.kind, ref.id, schema] for ref, schema in self._schemas.items()],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(document, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def load(self, path: Path, source: str) -> bool:
        """Take in a snapshot; False (and a logged warning) when it is missing, damaged or of another registry."""
        try:
            document = json.loads(path.read_bytes())
            if document["format"] != _FORMAT or document["source"] != source:
                logger.warning("Schema snapshot %s belongs to %s; ignored", path, str(document.get("source"))[:200])
                return False
            schemas = {SchemaRef(_kind(kind), int(number)): schema for kind, number, schema in document["schemas"]}
            ids = {str(digest): int(number) for digest, number in document["ids"].items()}
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            logger.warning("Schema snapshot %s cannot be read and is ignored: %s", path, error)
            return False
        self._schemas.update(schemas)
        self._ids.update(ids)
        return True


def _kind(name: Any) -> Kind:
    if name not in ("content", "global"):
        raise ValueError(f"unknown kind of id {name!r:.40}")
    return "content" if name == "content" else "global"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
