"""A relay process, as ``somastack relay`` runs it, that also notes how many rows it ever had in flight."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from pathlib import Path

from soma_common.kafka.publisher import KafkaPublisher, KafkaPublishers, PublisherSettings, forget_cursors
from soma_common.outbox.publishing import Delivery, Sending
from soma_common.outbox.relay import Relay, identities
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.retry import Backoff
from soma_common.service import run_until_signalled
from tests.torture import mutants
from tests.torture.children import die_with_parent
from tests.torture.settings import Settings, dsn

# Small rounds, so that kills meet many of them and the bound on duplicates is narrow.
RELAY = RelaySettings(
    rows=400, transaction_rows=400, most_idle=0.1, maintenance=1.0, backoff=Backoff(base=0.05, maximum=1.0)
)


class _Gauge:
    """The most rows that were sent while their cursor was not saved: those of a round and of the one before it."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", buffering=1)
        self._last = self._most = 0

    def sending(self, rows: int) -> None:
        """A round is sent; the cursor of the one before may still be under way to the database."""
        if self._last + rows > self._most:
            self._most = self._last + rows
            self._file.write(json.dumps(self._most) + "\n")
        self._last = rows


def largest_in_flight(folder: Path) -> int:
    """Over all relay processes of a run."""
    return max((int(line) for path in folder.glob("*.gauge") for line in path.read_text().split()), default=0)


async def repair_relay(bootstrap: str) -> None:
    """What an operator does after a promotion: the cursors in Kafka are of a history that is gone."""
    publishers = KafkaPublishers(PublisherSettings(bootstrap=bootstrap))
    await forget_cursors(publishers, identities())
    await publishers.close()


def _measure(gauge: _Gauge) -> None:
    original = KafkaPublisher.send

    async def send(self: KafkaPublisher, sending: Sending) -> Delivery:
        gauge.sending(len(sending.rows))
        return await original(self, sending)

    KafkaPublisher.send = send  # type: ignore[method-assign]  # counts, changes nothing


async def main(folder: Path, name: str, life: int) -> None:
    """The process."""
    settings = Settings.load(folder)
    _measure(_Gauge(folder / f"{name}.{life}.gauge"))
    mutants.apply(settings.mutant, folder)
    publishers = KafkaPublishers(
        PublisherSettings(
            bootstrap=settings.bootstrap, delivery_timeout=5.0, open_timeout=5.0, transaction_timeout=60.0
        )
    )
    async with Pool(PoolSettings(dsn(folder), size=6)) as pool:
        relay = Relay(pool, publishers, exactly_once=settings.exactly_once, lease=settings.lease, settings=RELAY)
        await run_until_signalled(relay)
    await publishers.close()


if __name__ == "__main__":
    die_with_parent()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    asyncio.run(main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])))
