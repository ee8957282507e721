"""The sagas of the library broken on purpose, one promise at a time, inside of a run's own worker processes.

All are judged in the same short run, in which much goes wrong; the library as it is must pass it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from soma_common.sagas import machine, store
from soma_common.sagas.machine import Work
from soma_common.sagas.stepping import Stepper
from soma_common.sagas.steps import Unknown
from soma_common.sagas.store import Record, SagaStore, Seen

# The fence of several records, and that of one.
_OWNER, _OWNER_OF_ONE = (
    " AND s.owner = $15::uuid AND s.length >= g.known",
    " AND s.owner = $14::uuid AND s.length >= $3::integer",
)
_EPOCH, _EPOCH_OF_ONE = " AND s.epoch = g.epoch", " AND s.epoch = $2::bigint"
_RISES = "epoch = s.epoch + 1"


def apply(mutant: str | None) -> None:
    """Break this process; None: the library as it is."""
    if mutant is not None:
        MUTANTS[mutant].patch()


def _replace(owner: Any, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: this mutant must be written anew"
    setattr(owner, name, value)


def _rewritten(block: str, old: str, new: str) -> None:
    sql = store._SQL[block]
    assert old in sql, f"{old} is not in {block} any more: this mutant must be written anew"
    _replace(store, "_SQL", {**store._SQL, block: sql.replace(old, new)})


def _no_fence() -> None:
    """Whoever ever had a saga may write to it."""
    _epoch_stays()
    _rewritten("record", _EPOCH, " AND g.epoch > 0")
    _rewritten("record_one", _EPOCH_OF_ONE, " AND $2::bigint > 0")


def _epoch_stays() -> None:
    """Who takes a saga over has it under the epoch of the one before, who writes on."""
    _rewritten("record", _OWNER, " AND $15::uuid IS NOT NULL AND g.known >= 0")
    _rewritten("record_one", _OWNER_OF_ONE, " AND $14::uuid IS NOT NULL AND $3::integer >= 0")


def _undone_forwards() -> None:
    """Compensations run in the order of the steps."""
    machine.reversed = iter  # type: ignore[attr-defined]  # hides the one that is built in


def _record_apart() -> None:
    """A transactional step is marked as done by a commit of its own."""
    record = SagaStore.record

    async def apart(self: SagaStore, records: Sequence[Record], tx: Any | None = None) -> dict[int, Seen]:
        seen = await record(self, records)
        if tx is not None:
            await asyncio.sleep(0.02)  # what a busy disk does to the other commit
        return seen

    _replace(SagaStore, "record", apart)


def _begins_untold() -> None:
    """That an external step begins is not written, whatever its policy says."""
    announce = Stepper._announce

    async def silent(self: Stepper, work: Work) -> bool:
        if not work.undo and work.part.unknown is not Unknown.RETRY:
            if self._course.unwritten:
                await self.write()
            return not self._course.over
        return await announce(self, work)

    _replace(Stepper, "_announce", silent)


def _signals_stay() -> None:
    """A signal that was taken is there for the next one who waits."""

    async def leave(self: SagaStore, saga: UUID, signal: str, entry: int, tx: Any) -> None: ...

    _replace(SagaStore, "take_signal", leave)


def _turns_blindly() -> None:
    """A saga turns without finding out whether what was under way took effect."""
    _replace(machine, "_is_unclear", lambda work, journal, doubtful: False)


def _keeps_epoch(definition: str) -> str:
    """``take_over_sagas`` without its rise of the epoch."""
    assert _RISES in definition, "take_over_sagas raises the epoch differently now: this mutant must be written anew"
    return definition.replace(_RISES, "epoch = s.epoch")


@dataclass(frozen=True, slots=True)
class Mutant:
    """How the library is broken, and which checks are to notice. ``rewrite``: of ``soma.take_over_sagas``."""

    noticed_by: frozenset[str]
    patch: Callable[[], None]
    rewrite: Callable[[str], str] | None = None


def _by(*checks: str) -> frozenset[str]:
    return frozenset(checks)


MUTANTS: Mapping[str, Mutant] = {
    "saga-record-without-fence": Mutant(_by("journal", "effects"), _no_fence),
    "saga-take-over-keeps-epoch": Mutant(_by("journal", "effects"), _epoch_stays, _keeps_epoch),
    "saga-undone-forwards": Mutant(_by("done or undone"), _undone_forwards),
    "saga-record-apart": Mutant(_by("effects", "events"), _record_apart),
    "saga-begins-untold": Mutant(_by("bank"), _begins_untold),
    "saga-signal-stays": Mutant(_by("signals"), _signals_stay),
    "saga-turns-blindly": Mutant(_by("bank"), _turns_blindly),
}
