"""REQUIREMENTS 24.4 on the real log: whatever fails, however often it is replayed, each event has its effect once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soma_common.consumer.handlers import HandlerContext, Handlers
from soma_common.errors import DatabaseUnavailable, HandlerFailed, LeaseLost, ReplayRefused, TransactionConflict
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.store import EventStore
from soma_common.inbox import Inbox, consumer_id
from soma_common.postgres.pool import Pool, PoolSettings
from soma_common.replay.engine import ReplayEngine, ReplaySettings
from soma_common.replay.models import ReplayFilter, ReplayMode, ReplayState
from soma_common.retry import Backoff

TABLE = "CREATE TABLE IF NOT EXISTS applied (seq bigserial, consumer text, event_id uuid)"
# What happens at a call of the handler: nothing, or one of these.
_FAULTS = st.dictionaries(
    st.integers(0, 60), st.sampled_from(["error", "conflict", "away", "cut", "stolen", "paused", "left"]), max_size=8
)
# Which of the events the live consumer knows; which have a key that the caller gave.
_EVENTS = st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 3)), min_size=1, max_size=30)


class _Trial:
    """One consumer, its live past, and a run that meets faults."""

    def __init__(self, pool: Pool, name: str, faults: dict[int, str]) -> None:
        self.pool, self.name, self.faults, self.calls = pool, name, dict(faults), 0
        self.store = EventStore(pool, AppendSettings("tests"))
        self.run_id: Any = None

    async def past(self, events: list[tuple[bool, bool, int]]) -> tuple[list[RecordedEvent], list[RecordedEvent]]:
        """Publish; the live consumer has passed all, and applied some."""
        drafts = [
            Event(payload={}, event_type="order.paid", tenant_id=self.name, aggregate_id=f"a{key}",
                  idempotency_key=f"{self.name}-{n}" if keyed else None)
            for n, (_, keyed, key) in enumerate(events)
        ]  # fmt: skip
        recorded = list(await self.store.publish(drafts))
        known = [event for event, (is_known, _, _) in zip(recorded, events, strict=True) if is_known]
        inbox = Inbox(await consumer_id(self.pool, self.name))
        async with self.pool.transaction() as tx:
            await inbox.claim(tx, known)
            await self._write(tx, known)
        tick = (await self.pool.fetch("SELECT tick_id, token FROM soma.tick('0')"))[0]
        await self.pool.fetch(
            "INSERT INTO soma.shards (reader, shard, from_tick, from_token) VALUES ($1, 0, $2, $3)",
            f"consumer:{self.name}", *tick,
        )  # fmt: skip
        return recorded, known

    async def _write(self, tx: Any, events: list[RecordedEvent]) -> None:
        for event in events:
            await tx.execute("INSERT INTO applied (consumer, event_id) VALUES ($1, $2)", self.name, event.event_id)

    async def handle(self, event: RecordedEvent, ctx: HandlerContext) -> None:
        await self._write(ctx.tx, [event])
        self.calls += 1
        match self.faults.pop(self.calls, None):
            case "error":
                raise ValueError("bad luck")
            case "conflict":
                raise TransactionConflict
            case "away":
                raise DatabaseUnavailable
            case "cut":
                await self.pool.fetch("SELECT pg_terminate_backend($1)", ctx.tx.get_server_pid())  # type: ignore[attr-defined]
            case "stolen":
                await self.pool.fetch("UPDATE soma.replays SET epoch = epoch + 1 WHERE run_id = $1", self.run_id)
            case "paused":
                await self.pool.fetch("UPDATE soma.replays SET state = 'paused' WHERE run_id = $1", self.run_id)

    async def finish(self, mode: ReplayMode) -> None:
        """Run, resume and run again until it is done."""
        handlers = Handlers()
        handlers.add(self.handle, "order.paid")
        quick = ReplaySettings(batch=4, page=7, backoff=Backoff(base=0.001, maximum=0.002))
        wanted = ReplayFilter(tenant_id=self.name)
        async with ReplayEngine(self.pool.settings, self.name, handlers=handlers, settings=quick) as engine:
            self.run_id = (await engine.start(wanted, mode, requested_by="t", reason="t")).run_id
            while (found := await engine.progress(self.run_id)).state is not ReplayState.DONE:
                if found.state in (ReplayState.PAUSED, ReplayState.FAILED):
                    await engine.resume(self.run_id)
                try:
                    async for _ in engine.run(self.run_id):
                        if self.faults.pop(self.calls, None) == "left":
                            break
                except (HandlerFailed, LeaseLost):
                    pass
                except ReplayRefused:  # the epoch was stolen by nobody: its lease has to end
                    await self.pool.fetch(
                        "UPDATE soma.replays SET leased_until = '-infinity' WHERE run_id = $1", self.run_id
                    )


@pytest.mark.parametrize("mode", [ReplayMode.MISSING, ReplayMode.FORCE])
def test_each_event_has_its_effect_exactly_once(soma_database: str, mode: ReplayMode) -> None:
    trials = iter(range(10**6))

    async def trial(events: list[tuple[bool, bool, int]], faults: dict[int, str]) -> None:
        async with Pool(PoolSettings(soma_database, size=4)) as pool:
            await pool.fetch(TABLE)
            made = _Trial(pool, f"c{next(trials)}", faults)
            recorded, known = await made.past(events)
            await made.finish(mode)
            rows = await pool.fetch("SELECT event_id FROM applied WHERE consumer = $1 ORDER BY seq", made.name)
            applied = [row[0] for row in rows]
            first = [event.event_id for event in known]
            again = [event.event_id for event in recorded if mode is ReplayMode.FORCE or event not in known]
            assert applied == first + again  # once, in the order of the log

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(_EVENTS, _FAULTS)
    def check(events: list[tuple[bool, bool, int]], faults: dict[int, str]) -> None:
        asyncio.run(trial(events, faults))

    check()
