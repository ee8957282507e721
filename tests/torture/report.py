"""The counts of a run, as people read them, and its verdict."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rich.console import Console
from rich.table import Table

from tests.torture.history import RULES, History, Violation, duplicates, lost_by_promotion

SHOWN = 12  # violations printed per check
Read = TypeVar("Read")


@dataclass(frozen=True, slots=True)
class Report(Generic[Read]):
    """What one run showed. ``history``: what was read back, of any kind of run. ``seconds``: how long its stages took."""

    title: str
    history: Read
    violations: Sequence[Violation]
    chaos: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.violations


def counts(history: History) -> dict[str, str]:
    """The numbers that make the verdict worth something."""
    known, limits = history.known, history.limits
    found = {
        "acknowledged as committed": str(len(known.committed)),
        "… asynchronously": str(len(known.weak)),
        "rolled back": str(len(known.absent)),
        "outcome never learnt (transactions)": str(len(known.units)),
        "in the log": str(len(history.logged)),
        "streams": str(len({event.key for event in history.logged})),
        "fact rows": str(len(history.facts)),
    }
    if history.delivered is not None:
        mode = "none allowed" if limits.exactly_once else f"≤ {limits.kills} × {limits.in_flight}"
        found["records in Kafka"] = str(len(history.delivered))
        found["duplicates in Kafka"] = f"{duplicates(history)} ({mode})"
    for consumer, effects in history.effects.items():
        found[f"effects of {consumer}"] = str(len(effects))
    if history.effects:
        found["follow-ups"] = str(sum(1 for event in history.logged if event.cause is not None))
    for kind, letters in _letters(history).items():
        found[kind] = str(letters)
    for name, (runs, read) in history.replayed.items():
        found[f"replays by {name}"] = f"{runs}, {read} events read"
    for name, events in history.followed.items():
        found[f"read by {name}"] = str(len(events))
    if limits.promotion is not None:
        found["acknowledged and lost with the old primary"] = str(len(lost_by_promotion(history)))
    return found


def _letters(history: History) -> dict[str, int]:
    failed = [letter for letter in history.letters if letter.error_type]
    return {
        "dead letters": len(history.letters),
        "… that failed themselves": len(failed),
        "… that ended processes": sum(1 for letter in failed if letter.error_type.endswith("PoisonEvent")),
        "… that were mended": sum(1 for letter in failed if letter.edited),
        "… that waited behind others": len(history.letters) - len(failed),
    }


def show(report: Report[History], console: Console | None = None) -> None:
    """Print it."""
    print_report(report, counts(report.history), RULES, console or Console(width=110))


def print_report(report: Report[Any], numbers: Mapping[str, str], rules: Collection[str], console: Console) -> None:
    """The table of its numbers; below, what broke which rule."""
    table = Table(title=report.title, title_justify="left", show_header=False)
    for what, number in {**report.chaos, **numbers}.items():
        table.add_row(what, str(number))
    for stage, seconds in report.seconds.items():
        table.add_row(f"time: {stage}", f"{seconds:.1f} s")
    console.print(table)
    for name in rules:
        broken = [violation for violation in report.violations if violation.check == name]
        for violation in broken[:SHOWN]:
            console.print(f"✗ {violation}", style="red", markup=False, soft_wrap=True)
        if len(broken) > SHOWN:
            console.print(f"✗ {name}: and {len(broken) - SHOWN} more", style="red")
    if not report.violations:
        console.print(f"✓ all {len(rules)} checks hold", style="green")
