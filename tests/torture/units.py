"""Units of a writer's work: the events of one transaction, and what is known about how it ended."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from soma_common.events.models import Event
from tests.torture.journal import Journal, now
from tests.torture.settings import EVENT, Settings

FACT = "INSERT INTO facts (event_id, unit) SELECT id, $2 FROM unnest($1::uuid[]) AS id"
# How often each kind of work is done, relative to the others.
KINDS = {
    "short": 30,
    "many": 12,
    "late": 1,
    "held": 1,
    "rollback": 14,
    "savepoint": 8,
    "conflict": 7,
    "keyed": 8,
    "alone": 10,
    "cut": 4,
    "weak": 4,
}


@dataclass(slots=True)
class Unit:
    """Events that are to commit together, and those that a savepoint or the end rolls back for certain."""

    name: str
    events: list[Event] = field(default_factory=list)
    dropped: list[Event] = field(default_factory=list)
    weak: bool = False


class Work:
    """Makes units by chance and keeps the journal of one writer process."""

    def __init__(self, folder: Path, name: str, life: int) -> None:
        self.settings = Settings.load(folder)
        self.chance = random.Random(f"{self.settings.seed}:{name}:{life}")
        self.name, self._life, self._count = name, life, 0
        self._journal = Journal(folder / f"{name}.{life}.writer.jsonl")

    def kind(self) -> str:
        """What to do next."""
        return self.chance.choices(list(KINDS), list(KINDS.values()))[0]

    def unit(self) -> Unit:
        """An empty one with a name of its own."""
        self._count += 1
        return Unit(f"{self.name}.{self._life}.{self._count}")

    def key(self) -> int:
        """A key that all writers share; a few are much busier than the rest."""
        return int(self.settings.keys * self.chance.random() ** 2)

    def event(
        self, unit: Unit, key: int | str, *,
        fact: bool = True, follow: bool | None = None, idempotency_key: str | None = None, fate: str | None = None,
    ) -> Event:  # fmt: skip
        """One event; its payload tells the checker what belongs to it. What is not given of ``follow`` and ``fate`` is
        drawn."""
        number = key if isinstance(key, int) else sum(key.encode())
        follow = self.chance.random() < 0.03 if follow is None else follow
        payload = {"unit": unit.name, "fact": fact, "follow": follow, "pad": "x" * 150}
        fate = fate or self._fate()
        return Event(
            payload=payload if fate is None else {**payload, "fate": fate},
            tenant_id=f"tenant-{number % 2}",
            aggregate_type="order",
            aggregate_id=f"k{key}",
            event_type=EVENT,
            idempotency_key=idempotency_key,
        )

    def _fate(self) -> str | None:
        drawn = self.chance.random()
        for fate, share in self.settings.fates.items():
            drawn -= share
            if drawn < 0:
                return fate
        return None

    def fill(self, unit: Unit, kind: str) -> Unit:
        """The events of a unit of this kind."""
        if kind == "many":
            keys = [self.key() for _ in range(self.chance.randint(2, 6))]
            unit.events = [self.event(unit, self.chance.choice(keys)) for _ in range(self.chance.randint(5, 25))]
        elif kind == "held":
            unit.events = [self.event(unit, f"-{self.name}") for _ in range(3)]
        else:
            key = self.key()
            unit.events = [self.event(unit, key, fact=kind != "alone") for _ in range(self.chance.randint(1, 3))]
        if kind == "keyed":
            key = self.key()
            unit.events = [self.event(unit, key, idempotency_key=f"once-{key}-{self.chance.randint(0, 400)}")]
        if kind == "savepoint":
            unit.dropped = [self.event(unit, unit.events[0].aggregate_id[1:]) for _ in range(2)]
        if kind == "rollback":
            unit.events, unit.dropped = [], unit.events
        unit.weak = kind == "weak"
        return unit

    def pause(self) -> float:
        """Seconds until the next unit, on average one over the rate."""
        return self.chance.expovariate(self.settings.rate)

    def hold(self) -> float:
        """Seconds that a long transaction stays open."""
        return self.chance.uniform(0.2, self.settings.longest)

    def begins(self, unit: Unit) -> None:
        """Before anything is sent."""
        self._journal.write(
            {"u": unit.name, "s": "try", "e": _ids(unit.events), "x": _ids(unit.dropped), "w": unit.weak, "t": now()}
        )

    def ends(self, unit: Unit, committed: Sequence[Event]) -> None:
        """Once it is known which of its events are in the log; the others are not and never will be."""
        there = {event.event_id for event in committed}
        absent = [event for event in unit.events if event.event_id not in there]
        self._journal.write({"u": unit.name, "s": "end", "ok": _ids(committed), "no": _ids(absent), "t": now()})


def _ids(events: Sequence[Event]) -> list[str]:
    return [str(event.event_id) for event in events]
