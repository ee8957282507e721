"""What the policy asks for, now: decided from what the database says, without touching anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from soma_common.retention.catalog import Catalog, Partition
from soma_common.retention.policy import Keep, RetentionPolicy
from soma_common.sql.loader import blocks


class Action(StrEnum):
    """What becomes of a partition: kept, thinned out (some types go), or dropped as a whole."""

    KEEP = "keep"
    THIN = "thin"
    DROP = "drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One partition and what is to be done with it.

    ``expired`` are the types of which every event there is past its time. ``waits`` says what must happen first; a step
    that waits for readers only (``behind``) can be forced.
    """

    partition: Partition
    action: Action
    expired: tuple[str, ...]
    kept: tuple[str, ...]
    waits: str | None = None
    behind: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """Rows beside the log that are past their time: how many, and partitions of the inbox."""

    inbox_keys: int
    idempotency_keys: int
    letters: int
    replays: int
    inbox_partitions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPlan:
    """What a run would do now."""

    at: datetime
    steps: tuple[Step, ...]
    expired: Expired


_RUNNING: Final = "a transaction that may write there still runs"


async def make_plan(catalog: Catalog, policy: RetentionPolicy) -> RetentionPlan:
    """Look at every partition, and count what is expired beside the log."""
    _, _, now = await catalog.about()
    steps = await plan_steps(catalog, policy, now)
    times = [before(now, keep) for keep in (policy.inbox, policy.idempotency_keys, policy.letters, policy.replays)]
    keys, idempotency, letters, replays, partitions = (
        await catalog.pool.fetch_planned(blocks("retention")["expired"], *times)
    )[0]
    expired = Expired(
        inbox_keys=keys, idempotency_keys=idempotency, letters=letters, replays=replays, inbox_partitions=partitions
    )
    return RetentionPlan(at=now, steps=steps, expired=expired)


async def plan_steps(catalog: Catalog, policy: RetentionPolicy, now: datetime) -> tuple[Step, ...]:
    """The partitions that the log has left behind, oldest first."""
    if not policy.archives:
        return ()
    found = []
    for partition in await catalog.partitions():
        types = await catalog.types(partition.lower_position, partition.upper_position)
        found.append(decide(partition, types, policy, now))
    return tuple(found)


def decide(partition: Partition, types: Mapping[str, datetime], policy: RetentionPolicy, now: datetime) -> Step:
    """What to do with a partition, from when each of its types was recorded last.

    An empty one is kept: nothing would be won, and a drop is never without an archive.
    """
    expired = tuple(sorted(kind for kind, last in types.items() if _is_past(now, last, policy.keeps(kind))))
    kept = tuple(sorted(set(types) - set(expired)))
    if not expired:
        return Step(partition=partition, action=Action.KEEP, expired=(), kept=kept)
    action = Action.THIN if kept else Action.DROP
    if partition.tick_id is None:
        return Step(partition=partition, action=action, expired=expired, kept=kept, waits=_RUNNING)
    waits = f"not passed by {', '.join(partition.behind)}" if partition.behind else None
    return Step(
        partition=partition, action=action, expired=expired, kept=kept, waits=waits, behind=partition.behind
    )  # fmt: skip


def before(now: datetime, keep: Keep) -> datetime | None:
    """What lies before this moment is past its time; None: nothing is."""
    return None if keep is None else now - keep


def _is_past(now: datetime, last: datetime, keep: Keep) -> bool:
    return keep is not None and last < now - keep
