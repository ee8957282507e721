"""The library broken on purpose, one promise at a time. Nothing here touches the library's files.

A mutant is a patch inside the run's own processes, or a changed function in the run's own database. Each has a scenario
that walks straight into the hole; the same scenario with the whole library must pass the same checker.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg

from soma_common.consumer.lanes import Again, Lane
from soma_common.consumer.positions import Positions
from soma_common.consumer.source import Record
from soma_common.errors import BrokerUnavailable
from soma_common.inbox import NO_LANE, Claim, Inbox, LaneCount
from soma_common.kafka.publisher import KafkaPublisher, KafkaPublishers
from soma_common.outbox.groups import Batch
from soma_common.outbox.publishing import Publisher
from soma_common.outbox.pump import Pump
from soma_common.outbox.relay import Relay
from soma_common.postgres.cursor import Cursor, Diff, Tick, TickReader
from tests.torture.settings import dsn

# Places where a scenario may stop or end a process: the process does it to itself when it finds the file.
STOP_BEFORE_COMMIT = "stop-before-commit"
STOP_WHILE_OPENING = "stop-while-opening"
ZOMBIE_IS_DONE = "zombie-is-done"  # made by a process that stopped before its COMMIT, once that has ended
DIE_IN_HANDLER = "die-in-handler"
DIE_BEFORE_COMMIT = "die-before-commit"


def reached(folder: Path, place: str, who: str = "") -> bool:
    """Stop or end this process here if the scenario asks for it (and for this ``who``), once; whether it did."""
    wish = folder / place
    if not wish.exists() or wish.read_text() != who:
        return False
    wish.unlink()
    os.kill(os.getpid(), signal.SIGSTOP if place.startswith("stop") else signal.SIGKILL)
    return True


def apply(name: str | None, folder: Path) -> None:
    """Prepare this process: the places where scenarios stop it, and the mutant's patch (None: the library as it is)."""
    _mark_places(folder)
    if name is not None:
        MUTANTS[name].patch(folder)


def _mark_places(folder: Path) -> None:
    commit, stored, complete = KafkaPublisher.commit, KafkaPublisher.read_stored, LaneCount.complete

    async def marked_commit(self: KafkaPublisher, text: str) -> None:
        stopped = reached(folder, STOP_BEFORE_COMMIT)
        try:
            await commit(self, text)
        finally:
            if stopped:
                (folder / ZOMBIE_IS_DONE).touch()

    async def marked_stored(self: KafkaPublisher) -> None:
        reached(folder, STOP_WHILE_OPENING, str(self._identity))
        await stored(self)

    async def marked_complete(self: LaneCount, tx: Any) -> LaneCount:
        following = await complete(self, tx)
        if (folder / DIE_BEFORE_COMMIT).exists():
            await asyncio.sleep(0.5)  # several writes of the positions
            reached(folder, DIE_BEFORE_COMMIT)
        return following

    _replace(KafkaPublisher, "commit", marked_commit)
    _replace(KafkaPublisher, "read_stored", marked_stored)
    _replace(LaneCount, "complete", marked_complete)


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
        return await self.at(tick_id, 0)

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
        await self._saver.save(batch, batch.ends(), ())
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

    original, read = KafkaPublishers.open, KafkaPublisher._fetch_stored

    async def hasty(self: KafkaPublishers, identity: str | None) -> KafkaPublisher:
        if identity is None:
            return await original(self, identity)
        spy = self.producer(None)
        await spy.start()
        early = KafkaPublisher(spy, self.settings, identity)
        try:
            stored = await read(early)
        except Exception as error:
            raise BrokerUnavailable(str(error)) from error
        finally:
            await abandon(spy)
        reached(folder, STOP_WHILE_OPENING, identity)
        publisher = await original(self, identity)
        publisher.stored = stored
        return publisher

    _replace(KafkaPublishers, "open", hasty)


def _inbox_outside(folder: Path) -> None:
    """The inbox commits by itself, before the effects do."""
    claim = Inbox.claim

    async def apart(self: Inbox, tx: Any, events: Sequence[Any], lane: LaneCount = NO_LANE) -> Claim:
        connection = await asyncpg.connect(dsn(folder))
        try:
            await lane.begin(tx)
            return await claim(self, connection, events)
        finally:
            await connection.close()

    _replace(Inbox, "claim", apart)


def _position_before_commit(folder: Path) -> None:
    """The position is that of what was fetched, not of what was applied."""

    def hasty(self: Positions) -> list[Record]:
        return [track.open[-1] for track in self._tracks.values() if track.open]

    _replace(Positions, "moved", hasty)


def _retries_are_overtaken(folder: Path) -> None:
    """What waits for its next try holds nothing back."""

    def hold_alone(self: Lane, again: Sequence[Again], now: float) -> None:
        sequence_of = self._sequence_of
        for each in again:
            self._sequence_of = lambda record: os.urandom(16)
            hold(self, [each], now)
        self._sequence_of = sequence_of

    hold = Lane.hold
    _replace(Lane, "hold", hold_alone)


def _letters_are_overtaken(folder: Path) -> None:
    """Nobody asks whether a key has open letters."""

    async def careless(self: Inbox, tx: Any, sequences: Sequence[bytes]) -> frozenset[int]:
        return frozenset()

    _replace(Inbox, "behind", careless)


# Changed functions: rewritten from what the database has, so that a mutant differs in one thing only.

_TICK_NUMBERS = "CREATE SEQUENCE public.torture_tick;"
_SNAPSHOT = "v_now := pg_current_snapshot();"
_LOCK = "PERFORM pg_advisory_xact_lock(hashtextextended('soma.tick', 0));"
_DURABLE, _NOT_DURABLE = "set_config('synchronous_commit', 'on'", "set_config('synchronous_commit', 'off'"
# A session may be asked to dawdle between snapshot and lock, which one on a busy server does by itself now and then.
_DAWDLE = "IF current_setting('torture.dawdle', true) = 'yes' THEN PERFORM pg_advisory_xact_lock_shared(4711); END IF;"
_CHANGED = "soma.changed_since(v_last)"


def _rewritten(definition: str, pattern: str, replacement: str) -> str:
    changed, times = re.subn(pattern, lambda _: replacement, definition, flags=re.DOTALL)
    assert times > 0, f"{pattern} is not in soma.tick any more: this mutant must be written anew"
    return changed


def tick_not_durable(definition: str) -> str:
    """The tick's commit is left to the WAL writer."""
    return _rewritten(definition, re.escape(_DURABLE), _NOT_DURABLE)


def tick_in_memory(definition: str) -> str:
    """The tick is given to its reader and stored nowhere."""
    stored = r"INSERT INTO soma\.ticks\s+VALUES \(v_last\.tick_id \+ 1, (.*?)\)\s+RETURNING \* INTO v_last;"
    found = re.search(stored, definition, re.DOTALL)
    assert found is not None, "soma.tick stores its tick differently now: this mutant must be written anew"
    kept = f"SELECT nextval('public.torture_tick'), {found[1]} INTO v_last;"
    return _rewritten(definition, stored, kept)


def snapshot_before_lock(definition: str) -> str:
    """The snapshot is older than the lock.

    The guard that refuses a tick below its predecessor is gone too: it would hide what the order of the two is for.
    """
    definition = _rewritten(definition, r"IF pg_snapshot_xmax\(v_now\).*?END IF;", "")
    definition = _rewritten(definition, re.escape(_SNAPSHOT), "")
    definition = _rewritten(definition, re.escape(_LOCK), f"{_SNAPSHOT} {_DAWDLE} {_LOCK}")
    asked = f"({_CHANGED} OR coalesce(current_setting('torture.dawdle', true) = 'yes', false))"
    return _rewritten(definition, re.escape(_CHANGED), asked)


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
    "tick-in-memory": Mutant("reader_restart", _by("readers", "processes"), sql=_TICK_NUMBERS, rewrite=tick_in_memory),
    "tick-not-durable": Mutant("crash_after_rollbacks", _by("readers", "processes"), rewrite=tick_not_durable),
    "snapshot-before-lock": Mutant("two_tick_makers", _by("readers"), rewrite=snapshot_before_lock),
    "cursor-before-acknowledgement": Mutant("broker_dies", _by("delivery", "order"), _cursor_before_acknowledgement),
    "transactional-id-per-worker": Mutant("zombie_relay", _by("duplicates"), _transactional_id_per_worker),
    "cursor-before-initialisation": Mutant("slow_takeover", _by("duplicates"), _cursor_before_initialisation),
    "inbox-outside": Mutant("death_in_handler", _by("effects"), _inbox_outside),
    "position-before-commit": Mutant("death_before_commit", _by("effects"), _position_before_commit),
    "retries-overtaken": Mutant("failing_event", _by("effect order"), _retries_are_overtaken),
    "letters-overtaken": Mutant("failing_event", _by("effect order"), _letters_are_overtaken),
    "partitions-by-position": Mutant("late_commit_at_the_edge", _by("delivery"), sql=_CLEAN_BY_POSITION),
}
