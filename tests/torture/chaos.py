"""What goes wrong, and when: a schedule drawn from the seed, carried out on the run's processes and servers."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from soma_common.errors import ServerUnavailable
from tests.torture.children import Child
from tests.torture.consumers import SESSION
from tests.torture.world import World

WRITERS = ("writers", "sync_writers")
# Action -> how often, relative to the others.
SMALL = {
    "kill relays": 4,
    "pause relays": 2,
    "kill consumers": 4,
    "pause consumers": 2,
    "kill log_consumers": 3,
    "pause log_consumers": 1,
    "kill replayers": 2,
    "kill operators": 1,
    "kill writers": 3,
    "pause writers": 1,
    "kill followers": 1,
    "cut connections": 2,
}
_TERMINATE = """
SELECT count(pg_terminate_backend(pid)) FROM (
    SELECT pid FROM pg_stat_activity
    WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() ORDER BY random() LIMIT 4) AS chosen
"""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Seconds from the start, and what happens then."""

    actions: tuple[tuple[float, str], ...]

    @classmethod
    def draw(
        cls, seed: int, duration: float, *, database_restarts: int, broker_restarts: int,
        small: Mapping[str, int] = SMALL, pause: tuple[float, float] = (0.3, 1.8),
    ) -> Schedule:  # fmt: skip
        """The same for the same arguments. ``pause``: the least and most seconds between two small actions."""
        chance = random.Random(f"chaos:{seed}")
        actions: list[tuple[float, str]] = []
        actions += [(at, "restart database") for at in _spread(duration, database_restarts)]
        actions += [(at, "restart broker") for at in _spread(duration * 0.9, broker_restarts)]
        at = 1.0
        while at < duration - 1:
            actions.append((at, chance.choices(list(small), list(small.values()))[0]))
            at += chance.uniform(*pause)
        return cls(tuple(sorted(actions)))


def _spread(duration: float, times: int) -> Iterator[float]:
    for number in range(times):
        yield duration * (number + 0.7) / (times + 0.4)


class Chaos:
    """Carries out a schedule; counts what it did."""

    def __init__(self, world: World, seed: int) -> None:
        self.world, self._chance = world, random.Random(f"victims:{seed}")
        self.done: Counter[str] = Counter()
        self.relay_interruptions = 0
        self._later: list[tuple[float, Callable[[], object]]] = []

    def run(self, schedule: Schedule, duration: float) -> None:
        """Let it happen; ends with everything running."""
        begin = time.monotonic()
        waiting = list(schedule.actions)
        # What must happen does, also when restarts took longer than the time they were given.
        while (now := time.monotonic() - begin) < duration or any("restart" in action for _, action in waiting):
            self._due(now + begin)
            if waiting and waiting[0][0] <= now:
                self.act(waiting.pop(0)[1])
            for child in self.world.children:
                child.revive()
            time.sleep(0.03)
        self.heal()

    def heal(self) -> None:
        """Undo what is pending."""
        self._due(float("inf"))
        for child in self.world.children:
            child.resume()

    def act(self, action: str) -> None:
        """One thing goes wrong now."""
        verb, _, whom = action.partition(" ")
        if verb == "restart":
            self.restart_database() if whom == "database" else self.restart_broker()
        elif verb == "cut":
            self.cut_connections()
        else:
            self._hit(verb, whom)

    def restart_database(self) -> None:
        """As ``pg_ctl restart -m immediate``."""
        self._count("database restarts", relays=len(self.world.of("relays")))
        self.world.database.restart("immediate")

    def restart_broker(self) -> None:
        """SIGKILL or an orderly end, then a new start on the same folder."""
        if self.world.kafka is not None:
            self._count("broker restarts", relays=len(self.world.of("relays")))
            if self._chance.random() < 0.5:
                self.world.kafka.kill()
                self.world.kafka.start_again()
            else:
                self.world.kafka.restart()

    def cut_connections(self) -> None:
        """The server ends some sessions."""
        try:
            cut = int(self.world.database.sql.query(_TERMINATE))
        except ServerUnavailable:
            return  # the chosen session was the question's own, or the database is just coming back
        self.relay_interruptions += cut
        self.done["connections cut"] += cut

    def _hit(self, verb: str, role: str) -> None:
        places = self.world.of(role) if role != "writers" else [c for r in WRITERS for c in self.world.of(r)]
        victims = [child for child in places if child.running and not child.paused]
        if not victims:
            return
        victim = self._chance.choice(victims)
        self._count(f"{role} {verb}{'d' if verb.endswith('e') else 'ed'}", relays=int(role == "relays"))
        if verb == "kill":
            victim.kill()
            self.killed(victim)
            self._in(self._chance.uniform(0.1, 1.5), victim.start)
        else:
            victim.pause()
            self._in(self._chance.uniform(0.7, 1.6) * self._patience(role), victim.resume)

    def killed(self, victim: Child) -> None:
        """A process was killed."""

    def _patience(self, role: str) -> float:
        """Seconds after which others take a process's work over."""
        return SESSION if role == "consumers" else self.world.settings.lease

    def _count(self, what: str, *, relays: int) -> None:
        self.done[what] += 1
        self.relay_interruptions += relays

    def _in(self, seconds: float, what: Callable[[], object]) -> None:
        self._later.append((time.monotonic() + seconds, what))

    def _due(self, now: float) -> None:
        due = [what for at, what in self._later if at <= now]
        self._later = [(at, what) for at, what in self._later if at > now]
        for what in due:
            what()
