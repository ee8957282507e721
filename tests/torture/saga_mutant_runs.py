"""Runs each mutant of the sagas in a short run of torture, and the library as it is in the same run before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from tests.torture import sagas
from tests.torture.saga_mutants import MUTANTS
from tests.torture.sagas import Plan

# Much goes wrong in it, and workers are paused for longer than their lease.
SHORT = Plan(15.0, 7, workers=3, operators=4, rate=60.0, lease=1.0, restarts=0, pause=(0.15, 0.5), still=20.0)


def main(names: Sequence[str]) -> int:
    """Run them; 0 when each is caught by a check that it was meant for, and the library as it is passes."""
    console = Console(width=130)
    table = Table(title="Mutants of sagas", title_justify="left")
    for column in ("mutant", "verdict", "what the checker said", "violations"):
        table.add_column(column)
    (control,) = sagas.run(SHORT)
    good = control.ok
    table.add_row("none", "passes" if good else "FAILS", "\n".join(map(str, control.violations[:3])), "")
    for name in names:
        (report,) = sagas.run(replace(SHORT, mutant=name))
        said = [each for each in report.violations if each.check in MUTANTS[name].noticed_by]
        good = good and bool(said)
        table.add_row(
            name,
            "caught" if said else "NOT CAUGHT",
            "\n".join(str(each)[:160] for each in (said or report.violations)[:2]),
            f"{len(said)}",
        )
        console.print(f"{name}: {'caught' if said else 'NOT CAUGHT'}", highlight=False)
    console.print(table)
    return 0 if good else 1
