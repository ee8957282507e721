"""How a relay works, and what the parts of one relay share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from soma_common.outbox.publishing import PublisherFactory
from soma_common.outbox.queue import Outbox
from soma_common.outbox.stats import Condition, Meter
from soma_common.outbox.topics import Topics
from soma_common.postgres.cursor import TickReader
from soma_common.postgres.pool import Pool
from soma_common.postgres.shards import Shards
from soma_common.ranges import check_settings
from soma_common.retry import Backoff

ParkedHook = Callable[[str, bytes, int, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class RelaySettings:
    """How a relay works. Times in seconds.

    Args:
        rows: most rows of one round of a worker at-least-once, over all its groups.
        transaction_rows: most rows of a transaction, per group.
        least_idle, most_idle: the waits between two looks grow from the one to the other while nothing happens.
        save_idle: how often cursors are saved while only other transactions move the ticks.
        maintenance: how often partitions are cleaned and made, and ticks merged.
        slow: without an acknowledgement for so long, the broker is reported as away.
        drain: how long a stop waits for acknowledgements.
        stuck: without progress for so long, a relay is not live.
        on_parked: called with topic, key, position and reason of each row that is parked; must return soon.
    """

    rows: int = 20_000
    transaction_rows: int = 10_000
    least_idle: float = 0.002
    most_idle: float = 0.5
    save_idle: float = 1.0
    maintenance: float = 5.0
    slow: float = 5.0
    drain: float = 10.0
    stuck: float = 60.0
    backoff: Backoff = field(default_factory=lambda: Backoff(base=0.1, maximum=5.0))
    on_parked: ParkedHook | None = None

    def __post_init__(self) -> None:
        check_settings(
            self, rows=(1, 10_000_000), transaction_rows=(1, 10_000_000), least_idle=(0.0001, 3600),
            most_idle=(0.0001, 3600), save_idle=(0.001, 3600), maintenance=(0.001, 86_400), slow=(0.001, 86_400),
            drain=(0.0, 86_400), stuck=(0.1, 86_400), backoff=Backoff,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What the pumps of one relay share."""

    pool: Pool
    outbox: Outbox
    shards: Shards
    ticks: TickReader
    topics: Topics
    factory: PublisherFactory
    settings: RelaySettings
    meter: Meter
    database: Condition
    broker: Condition
