"""The library broken on purpose, one promise at a time. Nothing here touches the library's files.

A mutant is a patch inside the run's own processes, or a changed function in the run's own database. Each has a scenario
that walks straight into the hole; the same scenario with the whole library must pass the same checker.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from soma_common.consumer.dedup import Inbox
from soma_common.errors import BrokerUnavailable
from soma_common.kafka.publisher import KafkaPublisher, KafkaPublishers
from soma_common.kafka.source import KafkaSource
from soma_common.outbox.groups import Batch
from soma_common.outbox.publishing import Publisher
from soma_common.outbox.pump import Pump
from soma_common.outbox.relay import Relay
from soma_common.postgres.cursor import Cursor, Diff, Tick, TickReader
from tests.torture.settings import dsn

# Places where a scenario may stop or end a process: the process does it to itself when it finds the file.
STOP_BEFORE_COMMIT = "stop-before-commit"
STOP_WHILE_OPENING = "stop-while-opening"
DIE_IN_HANDLER = "die-in-handler"
DIE_BEFORE_COMMIT = "die-before-commit"


def reached(folder: Path, place: str) -> None:
    """Stop or end this process here if the scenario asks for it, once."""
    wish = folder / place
    if wish.exists():
        wish.rename(folder / f"{place}.done")
        os.kill(os.getpid(), signal.SIGSTOP if place.startswith("stop") else signal.SIGKILL)


def apply(name: str | None, folder: Path) -> None:
    """Prepare this process: the places where scenarios stop it, and the mutant's patch (None: the library as it is)."""
    _mark_places(folder)
    if name is not None:
        MUTANTS[name].patch(folder)


def _mark_places(folder: Path) -> None:
    commit, stored = KafkaPublisher.commit, KafkaPublisher.read_stored
    save = KafkaSource.save

    async def marked_commit(self: KafkaPublisher, text: str) -> None:
        reached(folder, STOP_BEFORE_COMMIT)
        await commit(self, text)

    async def marked_stored(self: KafkaPublisher) -> None:
        reached(folder, STOP_WHILE_OPENING)
        await stored(self)

    async def marked_save(self: KafkaSource, tx: Any, records: Sequence[Any]) -> None:
        await save(self, tx, records)
        reached(folder, DIE_BEFORE_COMMIT)

    _replace(KafkaPublisher, "commit", marked_commit)
    _replace(KafkaPublisher, "read_stored", marked_stored)
    _replace(KafkaSource, "save", marked_save)


def _replace(owner: type, name: str, function: Callable[..., Any]) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: this mutant must be written anew"
    setattr(owner, name, function)


def _nothing(folder: Path) -> None:
    """The mutant is in the database."""


# Patches.


def _order_by_position(folder: Path) -> None:
    """The cursor is the highest position that was seen."""

    async def next_diff(self: TickReader, cursor: Cursor, latest: Tick) -> Diff | None:
        beginning = await self._one_of_history(0)  # type: ignore[attr-defined]  # below
        return Diff(beginning, latest, cursor.position)

    async def one(self: TickReader, tick_id: int) -> Tick:
        return await self._tick(tick_id, 0)

    def after(self: Diff, position: int) -> Cursor:
        _highest[0] = max(_highest[0], position)
        return Cursor(0, 0, self.target.tick_id, self.target.token, _highest[0])

    _highest = [0]
    _replace(TickReader, "next_diff", next_diff)
    TickReader._one_of_history = one  # type: ignore[attr-defined]
    _replace(Diff, "after", after)
    _replace(Diff, "done", lambda self: after(self, self.position))


def _cursor_before_acknowledgement(folder: Path) -> None:
    """The cursor is saved, then the rows are sent."""
    relay = Pump._relay

    async def eager(self: Pump, publisher: Publisher, batch: Batch) -> None:
        await self._save(batch.ends(), batch)
        await relay(self, publisher, batch)

    _replace(Pump, "_relay", eager)


def _transactional_id_per_worker(folder: Path) -> None:
    """Nobody fences a former owner off, for it has another name."""
    init = Relay.__init__

    def named(self: Relay, *args: Any, **settings: Any) -> None:
        init(self, *args, **settings)
        self._identities = [f"{identity}-{self.worker}" for identity in self._identities]

    _replace(Relay, "__init__", named)


def _cursor_before_initialisation(folder: Path) -> None:
    """The stored cursor is read, then the identity is taken over."""
    from soma_common.kafka.publisher import abandon

    original = KafkaPublishers.open

    async def hasty(self: KafkaPublishers, identity: str | None) -> KafkaPublisher:
        if identity is None:
            return await original(self, identity)
        spy = self._producer(None)
        await spy.start()
        early = KafkaPublisher(spy, self.settings, identity)
        try:
            await early.read_stored()  # stops here when the scenario asks for it, before the identity is initialised
        except Exception as error:
            raise BrokerUnavailable(str(error)) from error
        finally:
            await abandon(spy)
        publisher = await original(self, identity)
        publisher.stored = early.stored
        return publisher

    _replace(KafkaPublishers, "open", hasty)


def _inbox_outside(folder: Path) -> None:
    """The inbox commits by itself, before the effects do."""
    claim = Inbox.claim

    async def apart(self: Inbox, tx: Any, events: Sequence[Any]) -> list[bool]:
        connection = await asyncpg.connect(dsn(folder))
        try:
            return await claim(self, connection, events)
        finally:
            await connection.close()

    _replace(Inbox, "claim", apart)


def _offset_before_commit(folder: Path) -> None:
    """The offset commits by itself, before the effects do."""
    save = KafkaSource.save

    async def apart(self: KafkaSource, tx: Any, records: Sequence[Any]) -> None:
        connection = await asyncpg.connect(dsn(folder))
        try:
            await save(self, connection, records)
        finally:
            await connection.close()

    _replace(KafkaSource, "save", apart)


# Changed functions.

_TICK_IN_MEMORY = """
CREATE SEQUENCE torture_tick;
GRANT ALL ON torture_tick TO PUBLIC;
CREATE OR REPLACE FUNCTION soma.tick(p_min_age interval DEFAULT '2 milliseconds')
RETURNS TABLE (tick_id bigint, token bigint, snapshot text, position_before bigint, position_after bigint, era integer)
LANGUAGE sql VOLATILE AS $$
    SELECT nextval('public.torture_tick'), 1::bigint, pg_current_snapshot()::text, 0::bigint, soma.last_position(), 1
$$;
"""

# The guard that refuses a tick below its predecessor is gone too: it would hide what the order of the two is for.
# A session may be asked to dawdle between snapshot and lock, which a busy server does by itself now and then.
_SNAPSHOT_BEFORE_LOCK = """
CREATE OR REPLACE FUNCTION soma.tick(p_min_age interval DEFAULT '2 milliseconds')
RETURNS TABLE (tick_id bigint, token bigint, snapshot text, position_before bigint, position_after bigint, era integer)
LANGUAGE plpgsql VOLATILE AS $$
#variable_conflict use_column
DECLARE
    v_last soma.ticks;
    v_now  pg_snapshot := pg_current_snapshot();
BEGIN
    IF current_setting('torture.dawdle', true) = 'yes' THEN
        PERFORM pg_advisory_xact_lock_shared(4711);
    END IF;
    PERFORM pg_advisory_xact_lock(hashtextextended('soma.tick', 0));
    SELECT * INTO v_last FROM soma.ticks ORDER BY tick_id DESC LIMIT 1;
    IF soma.changed_since(v_last) OR current_setting('torture.dawdle', true) = 'yes' THEN
        INSERT INTO soma.ticks
        VALUES (v_last.tick_id + 1, (random() * 9e18)::bigint, v_now, v_last.position_after, soma.last_position(),
                v_last.era, clock_timestamp())
        RETURNING * INTO v_last;
    END IF;
    RETURN QUERY SELECT v_last.tick_id, v_last.token, v_last.snapshot::text, v_last.position_before,
                        v_last.position_after, v_last.era;
END $$;
"""

_CLEAN_BY_POSITION = """
CREATE OR REPLACE FUNCTION soma.clean_outbox(p_lock_timeout interval DEFAULT '50 milliseconds') RETURNS integer
LANGUAGE plpgsql VOLATILE SECURITY DEFINER SET search_path = pg_catalog AS $$
DECLARE
    v_passed bigint := (SELECT min(t.position_after) FROM soma.shards s JOIN soma.ticks t ON t.tick_id = s.from_tick
                        WHERE s.reader LIKE 'relay:%');
    v_slot   integer;
BEGIN
    FOR v_slot IN 0..7 LOOP
        CONTINUE WHEN v_passed IS NULL OR v_slot >= v_passed >> 17;
        EXECUTE format('TRUNCATE soma.outbox_%s', v_slot);
    END LOOP;
    RETURN 0;
END $$;
"""

_DURABLE, _NOT_DURABLE = "set_config('synchronous_commit', 'on'", "set_config('synchronous_commit', 'off'"


def tick_not_durable(definition: str) -> str:
    """The tick's function, with its commit left to the WAL writer."""
    assert _DURABLE in definition, "soma.tick has changed: this mutant must be written anew"
    return definition.replace(_DURABLE, _NOT_DURABLE)


@dataclass(frozen=True, slots=True)
class Mutant:
    """How the library is broken, in which scenario, and which checks are to notice.

    ``sql`` changes the run's database; ``rewrite`` does so from the definition of ``soma.tick``.
    """

    scenario: str
    noticed_by: frozenset[str]
    patch: Callable[[Path], None] = _nothing
    sql: str = ""
    rewrite: Callable[[str], str] | None = None


def _by(*checks: str) -> frozenset[str]:
    return frozenset(checks)


MUTANTS: Mapping[str, Mutant] = {
    "order-by-position": Mutant("late_commit", _by("readers"), _order_by_position),
    "tick-in-memory": Mutant("reader_restart", _by("readers", "processes"), sql=_TICK_IN_MEMORY),
    "tick-not-durable": Mutant("crash_after_rollbacks", _by("readers", "processes"), rewrite=tick_not_durable),
    "snapshot-before-lock": Mutant("two_tick_makers", _by("readers"), sql=_SNAPSHOT_BEFORE_LOCK),
    "cursor-before-acknowledgement": Mutant("broker_dies", _by("delivery", "order"), _cursor_before_acknowledgement),
    "transactional-id-per-worker": Mutant("zombie_relay", _by("duplicates"), _transactional_id_per_worker),
    "cursor-before-initialisation": Mutant("slow_takeover", _by("duplicates"), _cursor_before_initialisation),
    "inbox-outside": Mutant("death_in_handler", _by("effects"), _inbox_outside),
    "offset-before-commit": Mutant("death_before_commit", _by("effects"), _offset_before_commit),
    "partitions-by-position": Mutant("late_commit_at_the_edge", _by("delivery"), sql=_CLEAN_BY_POSITION),
}
