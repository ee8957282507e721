"""How things stand: rates, what is unfinished, how far readers are behind, and whether anything needs a person."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from starlette.responses import Response

from soma_common.console.live import Parts, live
from soma_common.console.readers import Reader, readers
from soma_common.console.web import Ask, Page
from soma_common.events.store import ALL_TENANTS, AllTenants

BOUND: Final = 10_001  # things that are counted
_LOOKED: Final = 5_000  # newest events by which rates are told
_SLICES: Final = 60  # of ten seconds
_LATE: Final = timedelta(minutes=5)
_OLD: Final = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Rates:
    """Events of late. ``bars``: how many in each slice of ten seconds, the oldest first; ``known``: so many of the
    slices are whole, for the newest events only are looked at."""

    bars: tuple[int, ...]
    known: int
    per_second: float
    exact: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """Something that a person should look at."""

    sign: str
    text: str
    path: str


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything on the first page, at one moment."""

    at: datetime
    rates: Rates
    letters: Sequence[Any]
    sagas: Sequence[Any]
    readers: Sequence[Reader]
    database: Any
    attention: Sequence[Attention]


async def overview(ask: Ask) -> Response:
    """The first page."""
    return ask.page("overview.html", seen=await look(ask, ask.tenant), bound=BOUND)


async def watch(ask: Ask) -> Response:
    """The same, while it changes."""
    tenant = ask.tenant

    async def parts() -> Parts:
        return {"overview": ask.part("overview_part.html", seen=await look(ask, tenant), bound=BOUND)}

    return live(ask, parts, every=2.0)


async def look(ask: Ask, tenant: str | AllTenants) -> Overview:
    """How things stand now. Browsers that watch the same tenant share a look."""
    shared = ask.console.kept.setdefault("overview", {})
    async with ask.console.kept.setdefault("overview lock", asyncio.Lock()):
        known: Overview | None = shared.get(tenant)
        now = datetime.now(UTC)
        if known is None or now - known.at > timedelta(seconds=1):
            known = await _look(ask, tenant, now)
            if len(shared) > 100:
                shared.clear()
            shared[tenant] = known
    return known


async def _look(ask: Ask, tenant: str | AllTenants, now: datetime) -> Overview:
    backend = ask.backend
    rates = _rates(await backend.of_tenant("rates", tenant, _LOOKED))
    letters = await backend.of_tenant("letters", tenant, BOUND)
    sagas = await backend.of_tenant("sagas", tenant, BOUND)
    of_all = tenant is ALL_TENANTS
    found = await readers(backend) if of_all else []
    database = (await backend.fetch("database"))[0]
    return Overview(now, rates, letters, sagas, found, database, _attention(letters, sagas, found, now))


def _rates(rows: Sequence[Any]) -> Rates:
    counts = {min(max(0, slice_), _SLICES): count for slice_, count in rows}
    full = sum(counts.values()) >= _LOOKED
    known = max(counts, default=0) if full else _SLICES
    minute = [counts.get(at, 0) for at in range(min(6, max(1, known)))]
    return Rates(
        tuple(counts.get(at, 0) for at in range(_SLICES - 1, -1, -1)), known, sum(minute) / (10 * len(minute)), not full
    )  # fmt: skip


def _attention(letters: Sequence[Any], sagas: Sequence[Any], found: Sequence[Reader], now: datetime) -> list[Attention]:
    told = []
    dead = next((row for row in letters if row[0] == "dead"), None)
    if dead and dead[1]:
        told.append(
            Attention(
                "bad", _told(dead[1], "dead letter waits for a person", "dead letters wait for a person"), "/letters"
            )
        )
    stuck = next((row for row in sagas if row[0] == "stuck"), None)
    if stuck and stuck[1]:
        told.append(Attention("bad", _told(stuck[1], "saga is stuck", "sagas are stuck"), "/sagas?status=stuck"))
    for reader in found:
        if reader.lag and not reader.workers:
            told.append(Attention("bad", f"Nobody reads for {reader.name}: {reader.lag:,} events wait", "/readers"))
        elif reader.waits_since is not None and now - reader.waits_since > _LATE:
            told.append(Attention("doubt", f"{reader.name} is behind by more than five minutes", "/readers"))
        if reader.parked:
            told.append(Attention("bad", f"{_many(reader.parked)} rows that {reader.name} cannot send", "/letters"))
    oldest = min((row[2] for row in sagas if row[2] and row[0] != "stuck"), default=None)
    if oldest is not None and now - oldest > _OLD:
        told.append(Attention("doubt", "A saga began more than an hour ago and did not end", "/sagas"))
    return told


def _told(count: int, one: str, many: str) -> str:
    return f"1 {one}" if count == 1 else f"{_many(count)} {many}"


def _many(count: int) -> str:
    return f"{count:,}" if count < BOUND else f"{BOUND - 1:,}+"


ROOM: Final[tuple[tuple[str, str, Page], ...]] = (("/", "GET", overview), ("/live/overview", "GET", watch))
