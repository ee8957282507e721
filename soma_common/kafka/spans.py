"""What the relay's publisher shows of its work: a span per batch that it sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import orjson

from soma_common.kafka.batches import Batch
from soma_common.outbox.publishing import HEADERS
from soma_common.postgres.pool import Row
from soma_common.tracing.context import TraceContext
from soma_common.tracing.conventions import sending
from soma_common.tracing.tracer import TransactionTracer, kinship

_NOTHING: Final[AbstractContextManager[Any]] = nullcontext()


def sending_span(tracer: TransactionTracer, batch: Batch) -> AbstractContextManager[Any]:
    """Around the sending of a batch: a child of the append of its events where they are of one, else linked to all."""
    if not tracer.active:
        return _NOTHING
    what = sending(batch.topic, batch.partition, len(batch.rows))
    return tracer.doing(what, **kinship(_contexts(batch.rows)))


def _contexts(rows: Iterable[Row]) -> Iterator[TraceContext]:
    """The traces of rows, each once: rows of one trace have equal headers, so few of them are read."""
    for text in dict.fromkeys(row[HEADERS] for row in rows):
        headers = orjson.loads(text)
        parent = headers.get("traceparent")
        context = TraceContext.parse(parent, headers.get("tracestate")) if isinstance(parent, str) else None
        if context is not None:
            yield context
