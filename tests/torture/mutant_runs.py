"""Runs each mutant in its scenario, and the scenario with the whole library beside it."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from tests.torture.children import kill_all
from tests.torture.history import Violation, check
from tests.torture.mutants import MUTANTS, Mutant
from tests.torture.run import read_back
from tests.torture.scenarios import STAGES, Hand
from tests.torture.settings import Settings
from tests.torture.world import World

_YOUNG = re.compile(r"'00:00:00\.002'::interval")
_DEFINITION = "SELECT pg_get_functiondef('soma.tick(interval)'::regprocedure)"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the checker said of one scenario, with the mutant or (``mutant`` is None) without."""

    mutant: str | None
    violations: Sequence[Violation]
    seconds: float

    @property
    def checks(self) -> frozenset[str]:
        """The checks that found something."""
        return frozenset(violation.check for violation in self.violations)


def play(scenario: str, mutant: str | None = None, *, keep: bool = False) -> Outcome:
    """One scenario in a world of its own."""
    stage, begin = STAGES[scenario], time.monotonic()
    settings = Settings(seed=1, exactly_once=stage.exactly_once, mutant=mutant, lease=stage.lease)
    with World(settings, kafka=stage.kafka) as world:
        world.keep = keep
        if stage.young is not None:
            _change_tick(world, lambda definition: _YOUNG.sub(f"'{stage.young}'::interval", definition))
        if mutant is not None:
            _change_database(world, MUTANTS[mutant])
        try:
            asyncio.run(stage.play(world, Hand(world)))
        except TimeoutError as error:
            world.failures.append(str(error))
        kill_all(world.children)
        found = check(read_back(world))
        if keep:
            print(f"{scenario}, {mutant}: {world.folder}")
    return Outcome(mutant, found, time.monotonic() - begin)


def _change_database(world: World, mutant: Mutant) -> None:
    sql = world.database.sql
    if mutant.sql:
        sql.query(mutant.sql)
    if mutant.rewrite is not None:
        _change_tick(world, mutant.rewrite)


def _change_tick(world: World, rewrite: Callable[[str], str]) -> None:
    sql = world.database.sql
    sql.query(rewrite(sql.query(_DEFINITION)))


def main(names: Sequence[str], *, keep: bool = False) -> int:
    """Run them; 0 when each mutant is caught by a check that it was meant for, and no scenario fails without it."""
    console = Console(width=130)
    table = Table(title="Mutants", title_justify="left")
    for column in ("mutant", "scenario", "verdict", "what the checker said", "seconds"):
        table.add_column(column)
    good = True
    for name in names:
        mutant = MUTANTS[name]
        control, broken = play(mutant.scenario, keep=keep), play(mutant.scenario, name, keep=keep)
        caught = bool(broken.checks & mutant.noticed_by) and not control.violations
        good = good and caught
        verdict = "caught" if caught else ("the control fails" if control.violations else "NOT CAUGHT")
        said = control.violations or [v for v in broken.violations if v.check in mutant.noticed_by]
        table.add_row(
            name,
            mutant.scenario,
            verdict,
            "\n".join(map(str, said[:2])),
            f"{control.seconds:.0f} + {broken.seconds:.0f}",
        )
        console.print(f"{name}: {verdict}", highlight=False)
    console.print(table)
    return 0 if good else 1
