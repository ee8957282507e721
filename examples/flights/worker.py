"""A process of the demo: the application's consumers, or the relay, with a note of the stage it is in.

The stages are noted by wrapping the library's protocols (``Source``, ``PublisherFactory``) from outside; the library
knows nothing of it. Run as ``python -m examples.flights.worker consumer|relay FILE``.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from typing import Any

from examples.flights.projection import SERVICE, application
from examples.flights.stages import Board, Stage
from soma_common import Soma, configure_tracing
from soma_common.cli.main import main as somastack
from soma_common.config import otlp_endpoint
from soma_common.consumer.source import Drain, Partition, Record, Source
from soma_common.dlq.models import RawRecord
from soma_common.errors import SomaError
from soma_common.events.models import RecordedEvent
from soma_common.inbox import LaneCount
from soma_common.kafka.publisher import KafkaPublishers
from soma_common.kafka.source import KafkaSource
from soma_common.log.source import LogSettings, LogSource
from soma_common.outbox.publishing import Delivery, Publisher, Sending
from soma_common.service import run_until_signalled

LEASE = 1.5  # seconds
_SLOT: ContextVar[int] = ContextVar("slot")  # of the consumer in whose lane something runs
RELAY = SERVICE  # its name; workers of one name share the outbox


class StagedSource:
    """A source that notes where the consumer is; everything else is the wrapped source's."""

    def __init__(self, source: Source, board: Board, slot: int) -> None:
        self._source, self._board, self._slot = source, board, slot

    def _enter(self, stage: Stage, steps: int = 0) -> None:
        self._board.enter(stage, steps, slot=self._slot)

    def check_drain(self, seconds: float) -> None:
        """As the source does."""
        self._source.check_drain(seconds)

    async def start(self, consumer_id: int, drain: Drain) -> None:
        """The lanes of this consumer are started from here, and inherit its slot."""
        _SLOT.set(self._slot)
        await self._source.start(consumer_id, drain)

    async def fetch(self, most: int, without: Collection[Partition] = ()) -> Sequence[Record]:
        """With records the handlers begin."""
        records = await self._source.fetch(most, without)
        if records:
            self._enter(Stage.HANDLING, len(records))
        return records

    async def stay(self, seconds: float) -> None:
        """As the source does."""
        await self._source.stay(seconds)

    async def save(self, tx: Any, records: Sequence[Record]) -> None:
        """Effects have committed, and the positions are about to follow them."""
        self._enter(Stage.COMMITTED)
        await self._source.save(tx, records)

    async def saved(self, records: Sequence[Record]) -> None:
        """The positions have followed."""
        await self._source.saved(records)
        self._enter(Stage.WAITING)

    def delivers(self, record: Record) -> bool:
        """As the source says."""
        return self._source.delivers(record)

    def lag(self) -> Mapping[Partition, int]:
        """As the source says."""
        return self._source.lag()

    def raw(self, record: Record) -> RawRecord:
        """As the source says."""
        return self._source.raw(record)

    async def decode(self, raw: RawRecord) -> RecordedEvent:
        """As the source does."""
        return await self._source.decode(raw)

    async def rewind(self) -> None:
        """As the source does."""
        await self._source.rewind()

    def halt(self, partition: Partition) -> None:
        """As the source does."""
        self._source.halt(partition)

    @property
    def assigned(self) -> frozenset[Partition]:
        """As the source says."""
        return self._source.assigned

    @property
    def halted(self) -> frozenset[Partition]:
        """As the source says."""
        return self._source.halted

    async def stop(self) -> None:
        """Leaving."""
        self._enter(Stage.STOPPING)
        await self._source.stop()


class StagedPublisher:
    """A publisher that notes where the relay is; everything else is the wrapped publisher's."""

    def __init__(self, publisher: Publisher, board: Board) -> None:
        self._publisher, self._board = publisher, board
        self.stored = publisher.stored

    async def send(self, sending: Sending) -> Delivery:
        """Rows go out; the cursor moves after they are acknowledged."""
        self._board.enter(Stage.PUBLISHING, len(sending.rows))
        delivery = await self._publisher.send(sending)
        self._board.enter(Stage.ACKNOWLEDGED)
        return delivery

    async def commit(self, stored: str) -> None:
        """As the publisher does."""
        await self._publisher.commit(stored)

    async def close(self) -> None:
        """As the publisher does."""
        await self._publisher.close()


def note_commits(board: Board) -> None:
    """Note when a batch has written all it has to and only its COMMIT is left."""
    complete = LaneCount.complete

    async def noted(count: LaneCount, tx: Any) -> LaneCount:
        following = await complete(count, tx)
        board.enter(Stage.COMMITTING, slot=_SLOT.get())
        return following

    LaneCount.complete = noted  # type: ignore[method-assign,assignment]  # it does what the method did


async def consume(board: Board) -> None:
    """The application as it is; only the sources of its consumers are wrapped."""
    soma = application()
    note_commits(board)
    async with soma:
        workers = [soma.consumer(name) for name in soma.consumers]
        for slot, worker in enumerate(workers):
            worker.source = StagedSource(impatient(worker.source, soma, worker.consumer), board, slot)
        await run_until_signalled(*workers)


def impatient(source: Source, soma: Soma, consumer: str) -> Source:
    """The source, waiting less for the dead: who is killed every second is to be missed sooner than after ten."""
    if isinstance(source, LogSource):
        return LogSource(soma.pool, consumer, LogSettings(lease=LEASE))
    if isinstance(source, KafkaSource):
        settings = replace(source.settings, instance=f"demo-{consumer}")
        return KafkaSource(soma.pool, settings, soma.store.settings.codec)
    return source


def relay(board: Board) -> None:
    """``somastack relay``, the command itself, with a short lease; only its publishers are wrapped."""
    plain = KafkaPublishers.open

    async def staged(publishers: KafkaPublishers, identity: str | None) -> Publisher:
        return StagedPublisher(await plain(publishers, identity), board)

    KafkaPublishers.open = staged  # type: ignore[method-assign,assignment]  # it keeps the protocol's promises
    somastack(["relay", "--name", RELAY, "--lease", str(LEASE)])


def send_spans(service: str) -> None:
    """To the collector that OTEL_EXPORTER_OTLP_ENDPOINT names, if it names one."""
    if otlp_endpoint():
        configure_tracing(service=service)


def end_with_parent() -> None:
    """End at once when the demo is gone: its end of our standard input closes, even if it was killed."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1):  # not through the buffer, whose lock would outlive the interpreter
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def main(argv: Sequence[str]) -> int:
    """Run one process until SIGTERM."""
    kind, path = argv
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells every attempt, the library each change
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", level=logging.INFO)
    end_with_parent()
    send_spans(f"flights-{kind}")
    board = Board(Path(path))
    try:
        if kind == "relay":
            relay(board)
        else:
            asyncio.run(consume(board))
    except SomaError as error:
        print(f"{error.message} Cure: {error.cure}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
