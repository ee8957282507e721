"""The folder of ``.avsc`` files: one per event type and version, and the generic record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from soma_common.schemas.avro import Schema, artifact_id, schema_text

EventKey = tuple[str, int]


def file_name(key: EventKey) -> str:
    """``order.placed.v1.avsc``."""
    return f"{artifact_id(*key)}.avsc"


def differences(folder: Path, schemas: Mapping[EventKey, Schema]) -> list[str]:
    """One line per file that is missing, differs from its model, or belongs to none. May raise OSError."""
    wanted = {file_name(key): schema_text(schema, pretty=True) for key, schema in schemas.items()}
    found = {path.name: path.read_text(encoding="utf-8", errors="replace") for path in folder.glob("*.avsc")}
    missing = [f"{name} is missing" for name in wanted if name not in found]
    changed = [f"{name} differs from its model" for name in wanted if name in found and found[name] != wanted[name]]
    return sorted([*missing, *changed, *(f"{name} belongs to no model" for name in found if name not in wanted)])


def write(folder: Path, schemas: Mapping[EventKey, Schema]) -> list[Path]:
    """Write the files that are missing or differ; the others stay. Returns the written; may raise OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for key, schema in schemas.items():
        path, text = folder / file_name(key), schema_text(schema, pretty=True)
        if not path.exists() or path.read_text(encoding="utf-8", errors="replace") != text:
            path.write_text(text, encoding="utf-8")
            written.append(path)
    return written
