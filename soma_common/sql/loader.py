"""Named blocks of SQL: a line ``-- :name word : purpose`` starts a block in a .sql file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_BLOCK = re.compile(r"^-- :name (?P<name>\w+)(?: : (?P<purpose>.*))?$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered migration file; ``version`` is its number, ``name`` its words."""

    version: int
    name: str
    sql: str


@cache
def blocks(file: str) -> dict[str, str]:
    """The statements of ``soma_common/sql/<file>.sql`` by name."""
    text = files("soma_common.sql").joinpath(f"{file}.sql").read_text(encoding="utf-8")
    found = list(_BLOCK.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match["name"]: text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


@cache
def migrations() -> tuple[Migration, ...]:
    """All migrations, in order; their numbers run from 1 without a gap."""
    folder = files("soma_common.sql").joinpath("migrations")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sql"))
    return tuple(
        Migration(int(name[:4]), name[5:-4], folder.joinpath(name).read_text(encoding="utf-8")) for name in names
    )
