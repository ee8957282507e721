"""What a consumer shows of its work: a span per handled event, or batch, and one for each commit."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

from soma_common.consumer.handlers import Delivery
from soma_common.consumer.lanes import Lane
from soma_common.consumer.source import Partition, Place, Record
from soma_common.events.models import RecordedEvent
from soma_common.tracing.conventions import LOG, processing, settling
from soma_common.tracing.tracer import TransactionTracer, kinship

_NOTHING: Final[AbstractContextManager[Any]] = nullcontext()


class HandlerSpans:
    """The spans of one consumer. Without a provider nothing is made, and nothing is asked for."""

    def __init__(self, consumer: str) -> None:
        self._consumer = consumer
        self._tracer = TransactionTracer()

    @property
    def active(self) -> bool:
        """Whether there is a provider."""
        return self._tracer.active

    def around(
        self, lane: Lane, events: Sequence[RecordedEvent], place: int | None, delivery: Delivery
    ) -> AbstractContextManager[Any]:
        """Around the handlers of these events; ``place`` is that of a single one in its batch.

        Live it goes on with the trace that the event brought. What is done again is another story, long after: it
        begins a trace of its own (in a replay: belongs to the replay's), which is linked to the first one.
        """
        if not self._tracer.active:
            return _NOTHING
        contexts = [event.trace for event in events]
        what = processing(self._consumer, events, _placed(lane, place), _told(delivery))
        if delivery.replaying:
            return self._tracer.doing(what, links=dict.fromkeys(contexts))
        if delivery.redriven:
            return self._tracer.doing(what, links=dict.fromkeys(contexts), root=True)
        return self._tracer.doing(what, **kinship(contexts))

    def settled(self, records: Iterable[Record], events: Sequence[RecordedEvent], since: int) -> None:
        """A batch is committed; ``since`` is when its handlers had ended, in nanoseconds of the epoch."""
        partitions = {_destination(record.partition) for record in records}
        what = settling(self._consumer, partitions.pop() if len(partitions) == 1 else None, len(events))
        self._tracer.begin(what, since=since, **kinship(event.trace for event in events)).end()


def _placed(lane: Lane, place: int | None) -> Place | None:
    """Where an event of a batch was found, its destination by the name that conventions give it."""
    if not lane.trying:
        return None
    record = lane.trying[place or 0]
    return Partition(_destination(record.partition), record.partition.number), record.offset


def _destination(partition: Partition) -> str:
    return LOG if ":" in partition.name else partition.name  # no topic has one; a reader of the log does


def _told(delivery: Delivery) -> str:
    return "replay" if delivery.replaying else "redrive" if delivery.redriven else "live"
