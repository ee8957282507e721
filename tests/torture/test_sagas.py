"""The checker's own tests on hand-made histories of sagas, and a short run of torture."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest

from tests.torture import sagas
from tests.torture.saga_check import check
from tests.torture.saga_history import Account, Ack, Act, Called, History, Known, Line, Moved, Sent, Story, Told
from tests.torture.saga_plans import OPENING, ROUNDS, Plan, coins, draw, posting

SEED = 1


def _plan(name: str, least: int = 0) -> Plan:
    """The first saga of a definition in which nothing is to fail."""
    return next(p for p in (draw(SEED, n) for n in range(least, 10_000)) if p.name == name and not p.job.fates)


def _lines(*told: str) -> list[Line]:
    """Entries as ``what step``; all by one worker."""
    found = []
    for number, line in enumerate(told, 1):
        what, _, step = line.partition(" ")
        found.append(Line(number, step, what, 1, 1, why="compensate" if what == "turned" else None))
    return found


def _story(plan: Plan, status: str, lines: Sequence[Line], **more: Any) -> Story:
    """A saga whose effects are those of its journal."""
    acts = [line for line in lines if line.what in ("done", "undone") and line.step in MONEY]
    moved = []
    for line in acts:
        coin = next((each.result for each in lines if each.step == line.step.replace("insert", "coin")), None)
        debit, credit, cents = posting(plan.name, plan.job, line.step, coin or 0)
        undo = line.what == "undone"
        moved.append(Moved(line.step, undo, *((credit, debit) if undo else (debit, credit)), cents))
    saga_id = f"id-{plan.key}"
    given = {
        "events": Counter(f"{saga_id}:{m.step}{':undo' if m.undo else ''}" for m in moved), "given": asdict(plan.job),
        "moved": moved,
    }  # fmt: skip
    return Story(saga_id, plan.key, plan.name, status, len(lines), plan, lines=lines, **{**given, **more})


MONEY = {
    "hold", "credit", "fee", "reserve", "book", "confirm", "settle", "fund", "close", "rounds[0]/insert", "rounds[1]/insert",
}  # fmt: skip
TRANSFER, ORDER, CAREFUL, COINS = (_plan(name) for name in ("transfer", "order", "careful", "coins"))
BACK = _plan("transfer", TRANSFER.job.number + 1)
COMPENSATE = Line(2, "", "compensate", 0, 1, who="ann", why="ann:1")


def _coins() -> Story:
    lines = _lines(
        "done fund", "waiting pause", "done pause", "done rounds", "done rounds[0]/coin", "done rounds[0]/insert",
        "done rounds[1]/coin", "done rounds[1]/insert", "done close", "ended",
    )  # fmt: skip
    first, second = coins(COINS.job)
    lines[4], lines[6] = lines[4]._replace(result=first), lines[6]._replace(result=second)
    return _story(COINS, "completed", lines, signals=[Sent("a", first, 5), Sent("b", second, 7)])


def _whole() -> dict[str, Story]:
    """One saga of each kind of end."""
    paid = Called(ORDER.job.cents, 0, 1, 0, False)
    back = _lines("done hold", "compensate", "done credit", "turned", "undone credit", "undone hold", "ended")
    back[1] = COMPENSATE
    lost = _lines(
        "done hold",
        "begun charge",
        "unknown charge",
        "failed charge",
        "turned",
        "undone charge",
        "undone hold",
        "ended",
    )
    lost[3] = lost[3]._replace(error="soma.OutcomeUnknown")
    lost[4] = lost[4]._replace(why="charge")
    stuck = _lines("done reserve", "done charge", "done book", "done ship", "failed confirm", "stuck")
    stuck[4] = stuck[4]._replace(error="StepRefused")
    broken = Plan("order", replace(ORDER.job, fates={"confirm": "broken"}))
    return {
        "done": _story(TRANSFER, "completed", _lines("done hold", "done credit", "done fee", "ended")),
        "back": _story(BACK, "compensated", back),
        "lost": _story(CAREFUL, "compensated", lost, calls={"charge": Called(5, 5, 1, 1, False)}),
        "stuck": _story(broken, "stuck", stuck, calls={"charge": paid, "ship": paid}, open_letters=1, letters=1),
        "coins": _coins(),
    }


def _history(stories: Mapping[str, Story]) -> History:
    sums = Counter[int]()
    for story in stories.values():
        for moved in story.moved:
            sums[moved.debit] -= moved.cents
            sums[moved.credit] += moved.cents
    every = [story.plan.job.number for story in WHOLE.values() if story.plan]
    return History(
        known=Known(
            tried=frozenset(every), rolled_back=frozenset({-1}),
            acks=[Ack(s.plan.job.number, s.saga_id, 0.0) for s in WHOLE.values() if s.plan],
            acts=[Act("compensate", WHOLE["back"].saga_id, "ann:1", "ok", 0.0)],
            signals=[Told(WHOLE["coins"].saga_id, coin, 0.0) for coin in coins(COINS.job)],
        ),
        stories=list(stories.values()),
        accounts=[Account(n, OPENING, OPENING + cents, cents) for n, cents in sums.items()],
    )  # fmt: skip


WHOLE = _whole()


def _with(name: str, **changes: Any) -> History:
    return _history({**WHOLE, name: replace(WHOLE[name], **changes)})


def _told(name: str, **changes: Sequence[str]) -> History:
    """Another journal for a saga, with its effects as before."""
    lines = _lines(*changes["lines"])
    return _with(name, lines=lines, length=len(lines))


HISTORY = _history(WHOLE)
DONE, LOST, STUCK = WHOLE["done"], WHOLE["lost"], WHOLE["stuck"]
BAD = {
    "a saga is lost": ("started", _history({name: WHOLE[name] for name in WHOLE if name != "done"})),
    "a saga was rolled back": (
        "started", replace(HISTORY, known=replace(HISTORY.known, rolled_back={DONE.plan.job.number})),  # type: ignore[union-attr]
    ),
    "a saga from nowhere": ("started", replace(HISTORY, known=replace(HISTORY.known, tried=frozenset()))),
    "a saga twice": ("started", _history({**WHOLE, "again": DONE})),
    "another input": ("started", _with("done", given={})),
    "a key for two inputs": ("started", replace(HISTORY, known=replace(HISTORY.known, wrong=[1]))),
    "a saga that does not end": ("ends", _with("done", status="running")),
    "a gap in a journal": ("journal", _with("done", length=5)),
    "a step done twice": ("journal", _told("done", lines=["done hold", "done hold", "done credit", "done fee", "ended"])),
    "an entry after the end": ("journal", _told("done", lines=["done hold", "done credit", "ended", "done fee"])),
    "a former owner writes": (
        "journal", _with("done", lines=[DONE.lines[0]._replace(epoch=2), *DONE.lines[1:]]),
    ),
    "a stuck saga without a letter": ("letters", _with("stuck", open_letters=0)),
    "a letter of one that ended": ("letters", _with("done", open_letters=1)),
    "a step left out": ("done or undone", _told("done", lines=["done hold", "done credit", "ended"])),
    "undone in the wrong order": (
        "done or undone", _told("back", lines=["done hold", "done credit", "turned", "undone hold", "undone credit", "ended"]),
    ),
    "not all is undone": (
        "done or undone", _told("back", lines=["done hold", "done credit", "turned", "undone credit", "ended"]),
    ),
    "done after it turned": (
        "done or undone", _told("back", lines=["done hold", "turned", "done credit", "undone credit", "undone hold", "ended"]),
    ),
    "stuck before its pivot": ("done or undone", _told("stuck", lines=["done reserve", "failed charge", "stuck"])),
    "a failure without a reason": ("reasons", _told("stuck", lines=[f"{n.what} {n.step}" for n in STUCK.lines])),
    "turned for nothing": ("reasons", _with("back", lines=[n for n in WHOLE["back"].lines if not n.who])),
    "an effect twice": ("effects", _with("done", moved=[*DONE.moved, DONE.moved[0]])),
    "an effect is missing": ("effects", _with("done", moved=DONE.moved[1:])),
    "a cent is missing": ("effects", _with("done", moved=[DONE.moved[0]._replace(cents=1), *DONE.moved[1:]])),
    "half a posting": ("effects", _with("done", moved=[DONE.moved[0]._replace(rows=1), *DONE.moved[1:]])),
    "an account that got too much": (
        "ledger", replace(HISTORY, accounts=[replace(HISTORY.accounts[0], balance=1), *HISTORY.accounts[1:]]),
    ),
    "an event twice": ("events", _with("done", events=Counter(DONE.events) + Counter(list(DONE.events)[:1]))),
    "an event is missing": ("events", _with("done", events=Counter(list(DONE.events)[1:]))),
    "a charge that was not given back": ("bank", _with("lost", calls={"charge": Called(5, 0, 1, 1, False)})),
    "a charge that was given back": ("bank", _with("stuck", calls={"charge": Called(5, 5, 1, 1, False)})),
    "a key with two amounts": ("bank", _with("lost", calls={"charge": Called(5, 5, 1, 1, True)})),
    "a careful step twice": ("bank", _with("lost", calls={"charge": Called(5, 5, 2, 1, False)})),
    "a pivot that happened": ("bank", _history({**WHOLE, "stuck": _story(
        ORDER, "compensated", [*_lines("done reserve"), COMPENSATE, *(
            line._replace(number=n) for n, line in enumerate(_lines("turned", "undone reserve", "ended"), 3)
        )], calls={"ship": Called(5, 0, 1, 0, False)},
    )})),
    "a signal for two": ("signals", _with("coins", signals=[Sent("a", coins(COINS.job)[0], 5)])),
    "a signal that says something else": ("signals", _with("coins", signals=[
        Sent("a", 5, 5), Sent("b", coins(COINS.job)[1], 7),
    ])),
    "a signal that was lost": ("signals kept", _with("coins", signals=[])),
    "an act that stands nowhere": ("audit", replace(HISTORY, known=replace(HISTORY.known, acts=[
        *HISTORY.known.acts, Act("cancel", DONE.saga_id, "ann:2", "ok", 0.0),
    ]))),
    "an act of nobody": ("audit", replace(HISTORY, known=replace(HISTORY.known, acts=[]))),
    "too many calls": ("repeats", _with("stuck", calls={"charge": Called(ORDER.job.cents, 0, 9, 0, False)})),
    "a process that died by itself": ("processes", replace(HISTORY, failures=["worker0 ended"])),
}  # fmt: skip


def test_a_whole_history_passes() -> None:
    assert check(HISTORY) == []
    assert len(coins(COINS.job)) == ROUNDS


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_caught_by_its_check(name: str) -> None:
    expected, history = BAD[name]
    assert expected in {violation.check for violation in check(history)}


def test_what_a_promotion_took_is_no_fault() -> None:
    without = _history({name: WHOLE[name] for name in WHOLE if name != "done"})
    assert check(replace(without, moment=-1.0)) == []


@pytest.mark.timeout(300)
def test_twenty_seconds_of_torture() -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    plan = sagas.Plan(20.0, seed, workers=3, operators=2, rate=30.0, pause=(0.4, 1.5))
    for report in sagas.run(plan):
        sagas.show(report)
        assert report.ok, f"seed {seed}: " + "; ".join(map(str, report.violations[:10]))
