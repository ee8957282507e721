"""What every process of a torture run reads from the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from soma_common.events.append import AppendSettings
from soma_common.events.models import Event

TOPIC = "soma.torture.events"
PARTITIONS = 6
SERVICE = "torture"
CONSUMER = "torture"
LOG_CONSUMER = "torture-log"
FOLLOW_UP = "torture.answered"
EVENT = "torture.happened"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """One run. ``rate``: units of work a writer process aims at per second; times in seconds; ``fates``: the share of
    events that fail, by how they do."""

    seed: int
    bootstrap: str = ""
    exactly_once: bool = False
    lease: float = 2.0
    keys: int = 48
    rate: float = 40.0
    longest: float = 3.0
    mutant: str | None = None
    fates: Mapping[str, float] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Write them where the children look."""
        (folder / "settings.json").write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, folder: Path) -> Settings:
        """As a child reads them."""
        values: Mapping[str, object] = json.loads((folder / "settings.json").read_text())
        return cls(**values)  # type: ignore[arg-type]  # written by save


def dsn(folder: Path) -> str:
    """The database's address now: a promotion changes it."""
    return (folder / "dsn").read_text().strip()


def append_settings(settings: Settings) -> AppendSettings:
    """How writers and consumers publish; without Kafka there is no outbox."""
    return AppendSettings(service_id=SERVICE, route=_route if settings.bootstrap else None)


def _route(event: Event) -> str:
    return TOPIC
