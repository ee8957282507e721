"""A torture run of sagas: workers die, pause and lose their connections, the database restarts, people turn sagas around;
then everything is read back and judged."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

from rich.console import Console

from soma_common.errors import ServerUnavailable
from tests.torture import saga_gather
from tests.torture.chaos import Chaos, Schedule
from tests.torture.children import Child, stop_all
from tests.torture.journal import now
from tests.torture.report import Report, print_report
from tests.torture.run import Clock, watch
from tests.torture.saga_bank import TABLES
from tests.torture.saga_check import RULES, check
from tests.torture.saga_history import History, repeats
from tests.torture.saga_mutants import MUTANTS
from tests.torture.saga_plans import ACCOUNTS, OPENING
from tests.torture.saga_workers import AT_ONCE, owner_of
from tests.torture.settings import Settings
from tests.torture.world import World

RATE = 50_000 / 600  # sagas per second
LONG = 180.0  # seconds from which on a standby is promoted, too
STILL, DRAIN = 60.0, 900.0  # seconds without progress, and in all, until what has not ended is given up
_TELL = 10.0  # seconds between two words on how far it is
_WORKER = "saga_workers"
SMALL = {
    "kill saga_workers": 8,
    "pause saga_workers": 5,
    "kill saga_operators": 1,
    "kill saga_starters": 1,
    "cut connections": 4,
}
_OPEN = "INSERT INTO accounts SELECT unnest(ARRAY[{}]), {}, {}"
_TAKE_OVER = "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE proname = 'take_over_sagas'"
_HELD = "SELECT string_agg(saga_id || ' ' || epoch, ',') FROM soma.sagas WHERE owner = '{}'"


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run is. ``pause``: seconds between two of the smaller things that go wrong."""

    duration: float
    seed: int
    workers: int = 4
    operators: int = 1
    rate: float = RATE
    lease: float = 2.0
    restarts: int = 1
    pause: tuple[float, float] = (0.6, 3.0)
    promotion: bool = False
    keep: bool = False
    mutant: str | None = None
    still: float = STILL

    @classmethod
    def of(cls, duration: float, seed: int, *, promotion: bool = False, keep: bool = False) -> Plan:
        """A run of so many seconds."""
        restarts = max(1, round(duration / 150))
        return cls(duration, seed, restarts=restarts, promotion=promotion or duration >= LONG, keep=keep)


class SagaChaos(Chaos):
    """Notes which sagas a worker had when it was killed."""

    def __init__(self, world: World, seed: int) -> None:
        super().__init__(world, seed)
        self.deaths: list[tuple[str, int, float]] = []

    def killed(self, victim: Child) -> None:
        """A process was killed."""
        owner = owner_of(self.world.folder, victim.name, victim.lives)
        if victim.role != _WORKER or not owner.exists():
            return
        at = time.time()
        try:
            held = self.world.database.sql.query(_HELD.format(owner.read_text()))
        except ServerUnavailable:
            return  # the database is just coming back
        for each in filter(None, held.split(",")):
            saga_id, epoch = each.split()
            self.deaths.append((saga_id, int(epoch), at))

    def _patience(self, role: str) -> float:
        """A pause lasts for longer than the lease: others have its sagas when it wakes."""
        return 1.5 * self.world.settings.lease

    @property
    def interruptions(self) -> int:
        """How often calls of a worker may have been cut off."""
        done, workers = self.done, len(self.world.of(_WORKER))
        mine = sum(done[f"{_WORKER} {what}"] for what in ("killed", "paused")) + done["connections cut"]
        return mine + workers * (done["database restarts"] + done["promotions of a lagging standby"])


def run(plan: Plan) -> list[Report[History]]:
    """The run; a report, and one more for the promotion in the long form."""
    clock = Clock()
    with clock.stage("start"):
        settings = Settings(seed=plan.seed, rate=plan.rate, lease=plan.lease, mutant=plan.mutant)
        world = World(settings, kafka=False)
    with world:
        world.keep = plan.keep
        with clock.stage("start"):
            _open(world)
            _people(world, plan)
        chaos = SagaChaos(world, plan.seed)
        schedule = Schedule.draw(
            plan.seed, plan.duration, database_restarts=plan.restarts, broker_restarts=0, small=SMALL, pause=plan.pause
        )
        with clock.stage("chaos"):
            chaos.run(schedule, plan.duration)
        with clock.stage("drain"):
            drain(world, plan)
        reports = [_judge(_title(plan), world, chaos, clock)]
        if plan.promotion and reports[0].ok:
            reports.append(_promotion(plan, world, chaos))
        world.keep = world.keep or not (plan.mutant or all(report.ok for report in reports))
        if world.keep:
            print(f"journals and logs: {world.folder}")
    return reports


def _title(plan: Plan) -> str:
    return f"Torture of sagas, {plan.duration:.0f} s, {plan.workers} workers, seed {plan.seed}"


def _open(world: World) -> None:
    sql, mutant = world.database.sql, MUTANTS.get(world.settings.mutant or "")
    sql.query(TABLES)
    sql.query(_OPEN.format(",".join(map(str, ACCOUNTS)), OPENING, OPENING))
    if mutant is not None and mutant.rewrite is not None:
        sql.query(mutant.rewrite(sql.query(_TAKE_OVER)))


def _people(world: World, plan: Plan) -> None:
    for number in range(plan.workers):
        world.add(_WORKER, f"worker{number}")
    for number in range(plan.operators):
        world.add("saga_operators", f"operator{number}")
    world.add("saga_starters", "starter0")


def drain(world: World, plan: Plan) -> None:
    """Start nothing more, wait until every saga has ended, and once more when nobody cares for the stuck ones."""
    stop_all(world.of("saga_starters"), within=90.0)
    if _all_end(world, plan):
        stop_all(world.of("saga_operators"))
        _all_end(world, plan)


def _all_end(world: World, plan: Plan) -> bool:
    """Whether nothing is left; what is left is for the checker to name."""
    begin = moved = told = time.monotonic()
    before = -1
    while True:
        left, lines = asyncio.run(saga_gather.left(world.database.dsn))
        if not left:
            return True
        at = time.monotonic()
        if lines > before:
            before, moved = lines, at
        if at - moved > plan.still or at - begin > DRAIN:
            world.failures.append(f"{left} sagas do not end, nothing moved for {at - moved:.0f} s")
            return False
        if at - told > _TELL:
            told = at
            print(f"drains: {left} sagas are left after {at - begin:.0f} s", flush=True)
        for child in (*world.of(_WORKER), *world.of("saga_operators")):
            child.revive()
        time.sleep(0.5)


def _judge(title: str, world: World, chaos: SagaChaos, clock: Clock, moment: float = float("inf")) -> Report[History]:
    with clock.stage("read back and check"):
        history = asyncio.run(_read_back(world, chaos, moment))
        violations = check(history)
    return Report(title, history, violations, dict(chaos.done), dict(clock.seconds))


async def _read_back(world: World, chaos: SagaChaos, moment: float) -> History:
    dsn = world.database.dsn
    return History(
        known=saga_gather.known(world.folder),
        stories=await saga_gather.stories(dsn, world.settings.seed),
        accounts=await saga_gather.accounts(dsn),
        interruptions=chaos.interruptions,
        at_once=AT_ONCE,
        waited=await saga_gather.waited(dsn, chaos.deaths),
        moment=moment,
        failures=world.all_failures(),
    )


def _promotion(plan: Plan, world: World, chaos: SagaChaos) -> Report[History]:
    """The primary dies while its standby lags; the standby takes over its address, and everybody goes on."""
    clock = Clock()
    with clock.stage("promotion"):
        world.standby = world.database.standby()
        for role in ("saga_starters", "saga_operators"):
            for child in world.of(role):
                child.start()
        watch(world, 6.0)
        world.standby.catch_up(world.database)
        moment = now()  # what was acknowledged before is with the standby
        world.standby.disconnect()
        watch(world, 4.0)
        world.fail_over(between=lambda: None)
        watch(world, 8.0)
    chaos.done["promotions of a lagging standby"] += 1
    with clock.stage("drain"):
        drain(world, plan)
    return _judge(f"{_title(plan)}: after the promotion", world, chaos, clock, moment)


def counts(history: History) -> dict[str, str]:
    """The numbers that make the verdict worth something."""
    known, stories = history.known, history.stories
    ends = Counter(story.status for story in stories)
    acts = Counter(f"{act.verb}: {act.answer or 'never learnt'}" for act in known.acts)
    there, acked = {story.saga_id for story in stories}, {ack.saga_id for ack in known.acks}
    waits = sorted(history.waited)
    found = {
        "sagas": str(len(stories)),
        **{f"… {status}": str(count) for status, count in sorted(ends.items())},
        **{f"… {name}": str(count) for name, count in sorted(Counter(story.name for story in stories).items())},
        "acknowledged": str(len(acked)),
        "… and lost by a promotion": str(len(acked - there)),
        "rolled back": str(len(known.rolled_back)),
        "entries of journals": str(sum(story.length for story in stories)),
        "acts in the ledger": str(sum(len(story.moved) for story in stories)),
        "events": str(sum(sum(story.events.values()) for story in stories)),
        "calls of the bank": str(sum(c.charges + c.refunds for s in stories for c in s.calls.values())),
        "… that were repeated": f"{sum(map(repeats, stories))} (≤ {history.interruptions} × {history.at_once})",
        "signals": str(sum(len(story.signals) for story in stories)),
        "times that sagas were stuck": str(sum(story.letters for story in stories)),
        **{f"operators: {act}": str(count) for act, count in sorted(acts.items())},
    }
    if waits:
        found["after its worker's death a saga went on"] = (
            f"within {waits[len(waits) // 2]:.1f} s (median), {waits[-1]:.1f} s (the last of {len(waits)})"
        )
    return found


def show(report: Report[History]) -> None:
    """Print it."""
    print_report(report, counts(report.history), RULES, Console(width=110))
