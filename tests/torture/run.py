"""One torture run: start everything, let it be hurt, drain, read back, judge."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from tests.torture import gather
from tests.torture.chaos import WRITERS, Chaos, Schedule
from tests.torture.children import stop_all
from tests.torture.history import History, Limits, Promotion, check
from tests.torture.journal import now
from tests.torture.relays import largest_in_flight, repair_relay
from tests.torture.report import Report
from tests.torture.settings import CONSUMER, LOG_CONSUMER, Settings
from tests.torture.world import World

LONG = 180.0  # seconds from which on a run (of one mode or both) has many restarts and promotions
_TELL = 10.0  # seconds between two words on how far it is
RESTARTS = 22  # of the database, in a long run
FATES = {"flaky": 0.02, "broken": 0.003, "poison": 0.00007}  # shares of the events
LASTING = ("relays", "consumers", "log_consumers", "replayers", "operators")  # also through a promotion
STILL = 60.0  # seconds without anything arriving, once nothing goes wrong any more, after which a run is stuck
DRAIN = 900.0  # seconds that it may take in all: what stands behind broken events is mended letter by letter


@dataclass(frozen=True, slots=True)
class Plan:
    """How large a run is.

    Seconds of chaos, processes of each role, restarts of the database, and whether a standby takes over in the end.
    """

    duration: float
    seed: int
    exactly_once: bool = False
    writers: int = 2
    sync_writers: int = 1
    relays: int = 3
    consumers: int = 2
    log_consumers: int = 2
    replayers: int = 1
    operators: int = 2
    followers: int = 1
    rate: float = 40.0
    restarts: int = 1
    promotion: bool = False
    keep: bool = False
    fates: Mapping[str, float] = field(default_factory=lambda: dict(FATES))

    @property
    def title(self) -> str:
        mode = "exactly once" if self.exactly_once else "at least once"
        return f"Torture, {mode}, {self.duration:.0f} s, seed {self.seed}"


@dataclass(slots=True)
class Clock:
    """How long the stages of a run took."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time that is spent inside is of this stage."""
        begin = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - begin


def run(plan: Plan) -> list[Report[History]]:
    """The run; a report, and one more for the promotion in the long form."""
    clock = Clock()
    settings = Settings(seed=plan.seed, exactly_once=plan.exactly_once, rate=plan.rate, fates=plan.fates)
    with clock.stage("start"):
        world = World(settings)
    with world:
        world.keep = plan.keep
        chaos = Chaos(world, plan.seed)
        with clock.stage("start"):
            _people(world, plan)
        schedule = Schedule.draw(
            plan.seed,
            plan.duration,
            database_restarts=plan.restarts,
            broker_restarts=2 if plan.restarts > 1 else 1,
        )
        with clock.stage("chaos"):
            chaos.run(schedule, plan.duration)
        with clock.stage("drain"):
            drain(world)
        reports = [_judge(plan.title, world, chaos, clock)]
        if plan.promotion and reports[0].ok:
            reports.append(_promotion(plan, world, chaos))
        world.keep = world.keep or not all(report.ok for report in reports)
        if world.keep:
            print(f"journals and logs: {world.folder}")
    return reports


def _people(world: World, plan: Plan, phase: str = "a") -> None:
    for role in LASTING if phase == "a" else ():
        for number in range(getattr(plan, role)):
            world.add(role, f"{role.removesuffix('s')}{number}")
    for number in range(plan.followers):
        world.add("followers", f"{phase}-follower{number}")
    for number in range(plan.writers):
        world.add("writers", f"{phase}-writer{number}")
    for number in range(plan.sync_writers):
        world.add("sync_writers", f"{phase}-sync{number}")


def drain(world: World, *, still: float = STILL, within: float = DRAIN) -> None:
    """End the writers and wait until everything has arrived everywhere; what has not is for the checker to name."""
    stop_all([child for role in WRITERS for child in world.of(role)], within=45.0)
    begin = moved = told = time.monotonic()
    before = -1
    while (arrived := asyncio.run(_arrived(world))).missing:
        now = time.monotonic()
        if arrived.done > before:
            before, moved = arrived.done, now
        if now - moved > still or now - begin > within:
            what = f"nothing arrived for {still:.0f} s" if now - moved > still else f"not drained within {within:.0f} s"
            world.failures.append(f"{what}: {arrived.missing} are missing")
            return
        if now - told > _TELL:
            told = now
            print(f"drains: {arrived.missing} are missing after {now - begin:.0f} s", flush=True)
        for child in world.children:
            if child.role not in WRITERS:
                child.revive()
        time.sleep(0.5)


class _Arrived(NamedTuple):
    """Over all who are to have every event: how many they have, and how many they lack."""

    done: int
    missing: int


async def _arrived(world: World) -> _Arrived:
    dsn = world.database.dsn
    logged = await gather.count(dsn, "soma.events")
    there = [
        await gather.count(dsn, f"(SELECT DISTINCT event_id FROM effects WHERE consumer = '{consumer}') e")
        for consumer in consumers(world)
    ]
    if world.of("relays") and not world.of("consumers"):
        there.append(len({record.event_id for record in await gather.kafka(world.settings.bootstrap)}))
    met = gather.followed(world.folder, [child.name for child in world.of("followers")])
    there += [len(events) for events in met.values()]
    newer = await gather.count(dsn, "soma.events") - logged
    return _Arrived(sum(there), sum(max(0, logged - count) for count in there) + newer)


def consumers(world: World) -> list[str]:
    """Those that run in this world."""
    roles = {CONSUMER: "consumers", LOG_CONSUMER: "log_consumers"}
    return [consumer for consumer, role in roles.items() if world.of(role)]


def _judge(title: str, world: World, chaos: Chaos, clock: Clock) -> Report[History]:
    with clock.stage("read back and check"):
        history = read_back(world, chaos)
        violations = check(history)
    return Report(title, history, violations, dict(chaos.done), dict(clock.seconds))


def read_back(world: World, chaos: Chaos | None = None, promotion: Promotion | None = None) -> History:
    """The whole history of a world as it stands."""
    return asyncio.run(_read_back(world, chaos, promotion))


async def _read_back(world: World, chaos: Chaos | None, promotion: Promotion | None) -> History:
    dsn = world.database.dsn
    delivered = await gather.kafka(world.settings.bootstrap) if world.of("relays") else None
    logged = await gather.log(dsn)
    if promotion is not None and delivered is not None:
        there = {event.event_id for event in logged}
        ghosts = {r.event_id for r in delivered if r.follow_up and r.event_id not in there}
        promotion = replace(promotion, may_be_lost=promotion.may_be_lost | ghosts)
    limits = Limits(
        exactly_once=world.settings.exactly_once,
        kills=chaos.relay_interruptions if chaos else 0,
        in_flight=largest_in_flight(world.folder),
        crashes=chaos.done["database restarts"] if chaos else 1,
        promotion=promotion,
    )
    return History(
        known=gather.known(world.folder),
        logged=logged,
        facts=await gather.facts(dsn),
        limits=limits,
        delivered=delivered,
        effects={consumer: await gather.effects(dsn, consumer) for consumer in consumers(world)},
        letters=await gather.letters(dsn),
        replayed={child.name: gather.replayed(world.folder, child.name) for child in world.of("replayers")},
        followed=gather.followed(world.folder, [child.name for child in world.of("followers")]),
        failures=world.all_failures(),
    )


def _promotion(plan: Plan, world: World, chaos: Chaos) -> Report[History]:
    """The primary dies while its standby lags; the standby takes over its address, and everybody goes on."""
    clock = Clock()
    with clock.stage("promotion"):
        _end_followers(world)
        world.standby = world.database.standby()
        _people(world, plan, "b")
        watch(world, 6.0)
        world.standby.catch_up(world.database)
        moment = now()  # what was acknowledged before is with the standby
        world.standby.disconnect()
        watch(world, 4.0)
        world.fail_over(between=lambda: _note_ends(world))
        if plan.exactly_once:
            asyncio.run(repair_relay(world.settings.bootstrap))
        _restart_followers(world, plan)
        watch(world, 8.0)
    chaos.done["promotions of a lagging standby"] += 1
    chaos.relay_interruptions += plan.relays
    with clock.stage("drain"):
        drain(world)
    promotion = Promotion(gather.ended_after(world.folder, moment), world.ends)
    with clock.stage("read back and check"):
        history = read_back(world, chaos, promotion)
        violations = check(history)
    return Report(f"{plan.title}: after the promotion", history, violations, dict(chaos.done), dict(clock.seconds))


def _note_ends(world: World) -> None:
    time.sleep(1.0)  # what a relay had in its hands without the database
    world.ends = asyncio.run(gather.ends(world.settings.bootstrap))


def _end_followers(world: World) -> None:
    """A cursor in a file does not survive the promotion: the followers of after it begin anew."""
    followers = world.of("followers")
    stop_all(followers)
    world.children = [child for child in world.children if child not in followers]


def _restart_followers(world: World, plan: Plan) -> None:
    for child in world.of("followers"):
        child.kill()
    world.children = [child for child in world.children if child.role != "followers"]
    for number in range(plan.followers):
        world.add("followers", f"c-follower{number}")


def watch(world: World, seconds: float) -> None:
    """Let everybody work for a while."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for child in world.children:
            child.revive()
        time.sleep(0.1)


def until(done: Callable[[], bool], within: float, what: str) -> None:
    """Wait for a condition.

    Raises TimeoutError naming it.
    """
    end = time.monotonic() + within
    while not done():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {within:.0f} s: {what}")
        time.sleep(0.02)
