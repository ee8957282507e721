"""Processes that are killed at random moments, with work outstanding, and started again."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from examples.flights.stages import Board, Stage
from soma_common.errors import SomaError

ROOT = Path(__file__).parents[2]
_POLL = 0.001  # seconds
_IDLE = 5.0  # seconds without any progress after which it is asked now and then whether there is work left at all
_ASK = 0.5  # seconds between two such questions, each to the database
_PATIENCE = 60.0  # seconds without any progress before a process counts as stuck
# The stages at which a process is sometimes made to wait for its death, because chance hits them too rarely.
HOLDS = {
    "consumer": (Stage.COMMITTED, Stage.COMMITTING, Stage.HANDLING),
    "relay": (Stage.ACKNOWLEDGED, Stage.PUBLISHING),
}
# Stages at which there surely is work left.
SURE = {"consumer": Stage.HANDLING, "relay": Stage.PUBLISHING}


class ProcessFailed(SomaError):
    """A process of the demo ended by itself, or came to a standstill."""


@dataclass(frozen=True, slots=True)
class Plan:
    """When to kill: once a stage is reached, or so many steps after the start and a moment (seconds) later."""

    steps: int
    moment: float
    hold: Stage | None = None


@dataclass(frozen=True, slots=True)
class Kill:
    """A kill as it happened; ``outstanding`` is what the dead process had left to do."""

    kind: str
    number: int
    pid: int
    stage: Stage
    held: bool
    outstanding: int

    @property
    def where(self) -> str:
        """The stage in words."""
        if self.stage is Stage.ACKNOWLEDGED and not self.held:
            return "after an acknowledgement"  # the cursor may have followed already, or not
        return self.stage.text


def plans(kind: str, kills: int, share: int, seed: int) -> Iterator[Plan]:
    """The kills of one kind of process, the same for the same seed.

    The first kill of a consumer hits it between COMMIT and the positions, the first of a relay between
    acknowledgement and cursor; of the others one in four waits for a stage, the rest come at random moments.
    ``share`` is how many events there are per kill.
    """
    chance = random.Random(f"{seed}/{kind}")
    for number in range(kills):
        stages = HOLDS[kind]
        hold = stages[0] if number == 0 else chance.choice(stages) if chance.random() < 0.25 else None
        yield Plan(chance.randint(1, max(1, share // 2)), chance.uniform(0, 0.1), hold)


class Child:
    """One process of the demo, over all its lives. It ends by itself when the demo is gone."""

    def __init__(self, kind: str, folder: Path, env: Mapping[str, str]) -> None:
        self.kind = kind
        self.board = Board(folder / f"{kind}.stage")
        self.log = folder / f"{kind}.log"
        self._board_path = folder / f"{kind}.stage"
        paths = os.pathsep.join(filter(None, [str(ROOT), env.get("PYTHONPATH")]))
        self._env = {**env, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        """The process id of the present life; 0 before the first."""
        return self._process.pid if self._process else 0

    async def start(self, hold: Stage | None = None) -> None:
        """Begin a new life."""
        self.board.reset(hold)
        command = (sys.executable, "-m", "examples.flights.worker", self.kind, str(self._board_path))
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, env=self._env, stdin=asyncio.subprocess.PIPE, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for the demo, which then ends its processes one by one
            )  # fmt: skip

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    async def stop(self, patience: float = 20.0) -> None:
        """SIGTERM; the process must drain and end with exit code 0, unless it had not even begun to listen.

        Raises:
            ProcessFailed: it ended otherwise, or not in time (it is killed then).
        """
        if self._process is None:
            return
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            code = await asyncio.wait_for(self._process.wait(), patience)
        except TimeoutError:
            await self.kill()
            raise self.failure(f"did not end within {patience:g} s of SIGTERM") from None
        if code != 0 and not (code == -signal.SIGTERM and self.board.stage is Stage.STARTING):
            raise self.failure(f"ended with exit code {code} after SIGTERM")

    def check(self) -> None:
        """Raise ProcessFailed when the process is not alive although nobody killed it."""
        if self._process is not None and self._process.returncode is not None:
            raise self.failure(f"ended by itself with exit code {self._process.returncode}")

    def failure(self, what: str) -> ProcessFailed:
        """The error that the process did something wrong, with the end of its log."""
        said = self.log.read_text(errors="replace").strip().splitlines()[-15:] if self.log.exists() else []
        return ProcessFailed(f"The {self.kind} process {what}. The end of its log:\n" + "\n".join(said))


class Killer:
    """Kills one process by its plans, each time only with work outstanding.

    Args:
        outstanding: counts what the dead process had left to do.
        more: whether new work can still come.
        told: is given each kill.
    """

    def __init__(
        self, child: Child, outstanding: Callable[[], Awaitable[int]], more: Callable[[], bool],
        told: Callable[[Kill], None],
    ) -> None:  # fmt: skip
        self.child, self.done, self.missed, self.over = child, 0, 0, False
        self._outstanding, self._more, self._told = outstanding, more, told

    async def run(self, schedule: Iterator[Plan]) -> None:
        """All kills for which there is work; afterwards the process is alive for good."""
        for plan in schedule:
            if not await self._surely_kill(plan):
                break
        self.over = True
        await self.child.start()

    async def _surely_kill(self, plan: Plan) -> bool:
        """False when there is no work left for it, and none will come."""
        while not await self._kill(plan):
            if not self._more():
                return False
            # It had nothing left to do. New work comes for it, and it waits for its death in the midst of that.
            self.missed += 1
            plan = replace(plan, hold=SURE[self.child.kind])
        return True

    async def _kill(self, plan: Plan) -> bool:
        """One life and its end; whether it counts: there was work left."""
        child = self.child
        await child.start(plan.hold)
        await self._ripe(plan)
        await asyncio.sleep(0 if plan.hold else plan.moment)
        pid = child.pid
        await child.kill()
        kill = Kill(child.kind, self.done + 1, pid, child.board.stage, child.board.held, await self._outstanding())
        if kill.outstanding:
            self.done += 1
            self._told(kill)
        return kill.outstanding > 0

    async def _ripe(self, plan: Plan) -> None:
        """Until the plan's moment is near, or nothing is left to wait for."""
        board = self.child.board
        loop = asyncio.get_running_loop()
        seen, since = (board.stage, board.steps), loop.time()
        while not (board.held if plan.hold else board.steps >= plan.steps):
            self.child.check()
            still = loop.time() - since
            await asyncio.sleep(_ASK if still > _IDLE else _POLL)
            now = (board.stage, board.steps)
            if now != seen:
                seen, since = now, loop.time()
            elif still > _IDLE and not await self._outstanding():
                return
            elif still > _PATIENCE:
                raise self.child.failure(f"made no progress for {_PATIENCE:g} s")
