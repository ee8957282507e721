"""What the swaps are about: a ledger and its totals, filled in batches; now and then an event fails the first time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soma_common.consumer.handlers import BatchContext, Handlers
from soma_common.events.models import RecordedEvent
from soma_common.replay.projection import Projection

CONSUMER = "totals"
TABLES = """
CREATE TABLE ledger (event_id uuid PRIMARY KEY, key text NOT NULL, n bigint NOT NULL, seq bigserial);
CREATE TABLE total (key text PRIMARY KEY, n bigint NOT NULL, events bigint NOT NULL) WITH (fillfactor = 70);
CREATE TABLE mail (event_id uuid, at timestamptz DEFAULT clock_timestamp());
"""
PROJECTION = Projection(("ledger", "total"))

_LEDGER = """
INSERT INTO ledger (event_id, key, n)
SELECT g.event_id, g.key, g.n FROM unnest($1::uuid[], $2::text[], $3::bigint[]) WITH ORDINALITY AS g (event_id, key, n, place)
ORDER BY g.place
"""
_TOTALS = """
INSERT INTO total AS t (key, n, events)
SELECT g.key, sum(g.n), count(*) FROM unnest($1::text[], $2::bigint[]) AS g (key, n) GROUP BY g.key ORDER BY g.key
ON CONFLICT (key) DO UPDATE SET n = t.n + excluded.n, events = t.events + excluded.events
"""
_MAILS = "INSERT INTO mail (event_id) SELECT unnest($1::uuid[])"


def handlers(fail_every: int) -> Handlers:
    """The handlers; every so many-th event fails when it comes live, and not when it is re-driven."""

    async def book(events: Sequence[RecordedEvent], ctx: BatchContext) -> None:
        live = not (ctx.delivery.redriven or ctx.delivery.replaying)
        if live and fail_every and any(event.payload["n"] % fail_every == 0 for event in events):
            raise ValueError("not yet")
        ids = [event.event_id for event in events]
        keys: list[Any] = [event.aggregate_id for event in events]
        numbers = [event.payload["n"] for event in events]
        await ctx.tx.execute(_LEDGER, ids, keys, numbers)
        await ctx.tx.execute(_TOTALS, keys, numbers)
        if ctx.delivery.external_effects:
            await ctx.tx.execute(_MAILS, ids)

    made = Handlers()
    made.add(book, "money.moved", batch=True)
    return made
