"""A rebalance storm: every second a member joins a consumer group, leaves it or dies, while events keep coming.

Nothing may be lost or applied twice; the group never stands still for long, and has its steady rate again soon after.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.torture import gather, run
from tests.torture.children import Child, stop_all
from tests.torture.history import Violation, check
from tests.torture.settings import CONSUMER, Settings
from tests.torture.world import World

LONGEST_STANDSTILL = 30.0  # seconds
CALM_AGAIN = 30.0  # seconds within which the steady rate is there again
_WARM, _CALM, _LOOK = 10.0, 40.0, 0.5
_PATIENCE = 5  # times as long as it was to last
_STEADY = 0.7  # share of the rate before the storm; the rate of events itself varies by chance


@dataclass(frozen=True, slots=True)
class Sample:
    """How many effects there were at a moment (seconds from the beginning)."""

    at: float
    effects: int


@dataclass(frozen=True, slots=True)
class Storm:
    """What a storm showed. Times are seconds, rates effects per second."""

    seed: int
    seconds: float
    moves: dict[str, int]
    effects: int
    rate_before: float
    rate_within: float
    standstill: float
    calm_after: float | None
    violations: Sequence[Violation]

    @property
    def ok(self) -> bool:
        """Whether every promise held."""
        calm = self.calm_after is not None and self.calm_after <= CALM_AGAIN
        return not self.violations and calm and self.standstill <= LONGEST_STANDSTILL


def weather(seconds: float, seed: int, *, members: int = 6, rate: float = 25.0) -> Storm:
    """Let it storm for so many seconds over a group of at most so many members."""
    with World(Settings(seed=seed, rate=rate)) as world:
        world.add("relays", "relay0")
        places = [world.add("consumers", f"consumer{number}") for number in range(members)]
        world.add("writers", "writer0")
        watch = _Watch(world)
        watch.through(_WARM)
        begin = watch.samples[-1].at
        moves = _storm(world, places, seconds, random.Random(f"storm:{seed}"), watch)
        end = watch.samples[-1].at
        _everybody(places)
        watch.through(_CALM)
        stop_all(world.of("writers"))
        run.drain(world)
        violations = check(run.read_back(world))
        before = _rate(watch.samples, begin - _WARM / 2, begin)
        return Storm(
            seed=seed, seconds=seconds, moves=moves, effects=watch.samples[-1].effects, rate_before=before,
            rate_within=_rate(watch.samples, begin, end), standstill=_standstill(watch.samples, begin, end + _CALM / 2),
            calm_after=_calm_after(watch.samples, end, _STEADY * before), violations=violations,
        )  # fmt: skip


class _Watch:
    def __init__(self, world: World) -> None:
        self._world, self._begin, self.samples = world, time.monotonic(), list[Sample]()

    def look(self) -> None:
        count = asyncio.run(gather.count(self._world.database.dsn, f"effects WHERE consumer = '{CONSUMER}'"))
        self.samples.append(Sample(time.monotonic() - self._begin, count))

    def through(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.look()
            time.sleep(_LOOK)


def _storm(
    world: World, places: Sequence[Child], seconds: float, chance: random.Random, watch: _Watch
) -> dict[str, int]:
    moves = {"joined": 0, "left": 0, "died": 0}
    begin = following = time.monotonic()
    # On a machine with much else to do a move takes its time: it storms on until half of them were made.
    while (lasted := time.monotonic() - begin) < seconds or (
        sum(moves.values()) < seconds / 2 and lasted < _PATIENCE * seconds
    ):
        if time.monotonic() >= following:
            following += 1.0
            moves[_move(places, chance)] += 1
        for child in world.children:
            child.revive()
        watch.look()
        time.sleep(_LOOK / 2)
    return moves


def _move(places: Sequence[Child], chance: random.Random) -> str:
    """One member joins, leaves in good order or dies; at least one is always there."""
    there = [place for place in places if place.running]
    away = [place for place in places if not place.running]
    if away and (len(there) < 2 or chance.random() < 0.5):
        chance.choice(away).start()
        return "joined"
    leaving = chance.choice(there)
    if chance.random() < 0.5:
        leaving.kill()
        return "died"
    stop_all([leaving], within=20.0)
    return "left"


def _everybody(places: Sequence[Child]) -> None:
    for place in places:
        if not place.running:
            place.start()


def _rate(samples: Sequence[Sample], begin: float, end: float) -> float:
    chosen = [sample for sample in samples if begin <= sample.at <= end]
    if len(chosen) < 2:
        return 0.0
    return (chosen[-1].effects - chosen[0].effects) / (chosen[-1].at - chosen[0].at)


def _standstill(samples: Sequence[Sample], begin: float, end: float) -> float:
    """The longest time without a new effect."""
    longest, last = 0.0, Sample(begin, -1)
    for sample in samples:
        if begin <= sample.at <= end:
            if sample.effects != last.effects:
                last = Sample(sample.at, sample.effects)
            longest = max(longest, sample.at - last.at)
    return longest


def _calm_after(samples: Sequence[Sample], end: float, rate: float) -> float | None:
    """Seconds from the end of the storm until five seconds began in which the steady rate was there; None: never."""
    for sample in samples:
        if sample.at >= end and _rate(samples, sample.at, sample.at + 5.0) >= rate:
            return sample.at - end
    return None


def show(storm: Storm) -> None:
    """Print it."""
    console, table = Console(width=110), Table(title=f"Rebalance storm, {storm.seconds:.0f} s", title_justify="left")
    table.show_header = False
    for name in ("", ""):
        table.add_column(name)
    calm = "never" if storm.calm_after is None else f"{storm.calm_after:.1f} s"
    for what, value in {
        "seed": storm.seed,
        **{f"members that {what}": count for what, count in storm.moves.items()},
        "effects": storm.effects,
        "effects/s before": f"{storm.rate_before:.0f}",
        "effects/s within": f"{storm.rate_within:.0f}",
        "longest standstill": f"{storm.standstill:.1f} s (at most {LONGEST_STANDSTILL:.0f})",
        "steady again after": f"{calm} (at most {CALM_AGAIN:.0f} s)",
    }.items():
        table.add_row(what, str(value))
    console.print(table)
    for violation in storm.violations[:12]:
        console.print(f"✗ {violation}", style="red", markup=False, soft_wrap=True)
    console.print("✓ every check holds" if storm.ok else "✗ a promise was broken", style="green" if storm.ok else "red")
