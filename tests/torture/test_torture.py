"""The checker's own tests on hand-made histories, and a short torture run."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from tests.torture import run, storm
from tests.torture.history import (
    Delivered,
    Effect,
    Followed,
    History,
    Known,
    Letter,
    Limits,
    Logged,
    Promotion,
    check,
    duplicates,
    lost_by_promotion,
)
from tests.torture.report import show
from tests.torture.settings import CONSUMER, LOG_CONSUMER

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
KEYS = ("a", "b")
VERSIONS = 4


def _logged(key: str, version: int) -> Logged:
    return Logged(f"{key}{version}", key, version, BEGIN + timedelta(seconds=version), fact=True)


def _delivered(event: Logged, offset: int) -> Delivered:
    partition = KEYS.index(event.key)
    return Delivered(
        event.event_id, event.key, event.version, event.timestamp, event.event_id.encode(), partition, offset
    )


def _whole() -> History:
    """Two keys of four events each, everywhere once and in order; ``x`` was rolled back."""
    events = [_logged(key, version) for key in KEYS for version in range(1, VERSIONS + 1)]
    return History(
        known=Known(committed=frozenset(event.event_id for event in events), absent=frozenset({"x"})),
        logged=events,
        facts=[event.event_id for event in events],
        delivered=[_delivered(event, offset) for offset, event in enumerate(events)],
        effects={CONSUMER: [Effect(event.event_id, event.key, event.version, event.version - 1) for event in events]},
        followed={"reader": [Followed(event.event_id, event.key, event.version) for event in events]},
    )


WHOLE = _whole()
STILL = replace(WHOLE.logged[0], timestamp=WHOLE.logged[1].timestamp)
RECORDS = list(WHOLE.delivered or ())
EFFECTS = list(WHOLE.effects[CONSUMER])
READ = WHOLE.followed["reader"]
LETTER = Letter(
    CONSUMER, "resolved", RECORDS[2].event_id, "FateError", True, RECORDS[2].partition, RECORDS[2].offset,
    RECORDS[2].digest,
)  # fmt: skip


def _moved(values: list[Delivered], place: int, to: int) -> list[Delivered]:
    others = [value for value in values if value is not values[place]]
    return [*others[:to], values[place], *others[to:]]


def _again(record: Delivered, **changes: object) -> Delivered:
    return replace(record, offset=100, **changes)  # type: ignore[arg-type]  # fields by name


BAD = {
    "an acknowledged event is lost": (
        "acknowledged", replace(WHOLE, known=replace(WHOLE.known, committed=WHOLE.known.committed | {"lost"})),
    ),
    "a rolled-back event in Kafka": (
        "rolled back", replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0], event_id="x")]),
    ),
    "a rolled-back event in the log": ("rolled back", replace(WHOLE, logged=[*WHOLE.logged, _logged("x", 1)],
                                                              known=Known(absent=frozenset({"x1"})))),
    "a rolled-back fact": ("rolled back", replace(WHOLE, facts=[*WHOLE.facts, "x"])),
    "a rolled-back effect": ("rolled back", replace(WHOLE, effects={CONSUMER: [*EFFECTS, Effect("x", "x", 1, 0)]})),
    "half a transaction": ("whole", replace(WHOLE, known=Known(units=(frozenset({"a1", "gone"}),)))),
    "a fact is missing": ("facts", replace(WHOLE, facts=WHOLE.facts[1:])),
    "a fact too many": ("facts", replace(WHOLE, facts=[*WHOLE.facts, WHOLE.facts[0]])),
    "a gap in the log": ("log", replace(WHOLE, logged=WHOLE.logged[1:])),
    "a stamp that stands still": (
        "log", replace(WHOLE, logged=[STILL, *WHOLE.logged[1:]]),
    ),
    "an event never delivered": ("delivery", replace(WHOLE, delivered=RECORDS[:-1])),
    "an event from nowhere": ("delivery", replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0], event_id="ghost")])),
    "a version that changed on the way": ("delivery", replace(WHOLE, delivered=[_again(RECORDS[0], version=9)])),
    "a gap in Kafka": ("order", replace(WHOLE, delivered=[RECORDS[0], *RECORDS[2:]])),
    "two records change places": ("order", replace(WHOLE, delivered=_moved(RECORDS, 0, 1))),
    "a key in two partitions": ("order", replace(WHOLE, delivered=[*RECORDS[:-1], replace(RECORDS[-1], partition=5)])),
    "a repeat with other bytes": (
        "identity", replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0], digest=b"other")]),
    ),
    "too many repeats": ("duplicates", replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0]), _again(RECORDS[1])],
                                               limits=Limits(kills=1, in_flight=1))),
    "any repeat when exactly once": ("duplicates", replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0])],
                                                           limits=Limits(exactly_once=True, kills=9, in_flight=9))),
    "an effect twice": ("effects", replace(WHOLE, effects={CONSUMER: [*EFFECTS, EFFECTS[0]]})),
    "an effect is missing": ("effects", replace(WHOLE, effects={CONSUMER: EFFECTS[1:]})),
    "effects change places": (
        "effect order", replace(WHOLE, effects={CONSUMER: [EFFECTS[1], EFFECTS[0], *EFFECTS[2:]]}),
    ),
    "a handler that found another state": (
        "effect order", replace(WHOLE, effects={CONSUMER: [*EFFECTS[:-1], replace(EFFECTS[-1], previous=1)]}),
    ),
    "a letter that stays open": ("letters", replace(WHOLE, letters=[replace(LETTER, status="dead")])),
    "a letter with other bytes": ("letters", replace(WHOLE, letters=[replace(LETTER, digest=b"other")])),
    "a letter of nothing": ("letters", replace(WHOLE, letters=[replace(LETTER, offset=100)])),
    "a missing follow-up": (
        "follow-ups", replace(WHOLE, logged=[replace(WHOLE.logged[0], follow=True), *WHOLE.logged[1:]]),
    ),
    "a reader that missed one": ("readers", replace(WHOLE, followed={"reader": READ[:-1]})),
    "a reader that met one twice": ("readers", replace(WHOLE, followed={"reader": [*READ, READ[0]]})),
    "a reader out of order": ("readers", replace(WHOLE, followed={"reader": [READ[1], READ[0], *READ[2:]]})),
    "a process that died by itself": ("processes", replace(WHOLE, failures=["relay0 ended"])),
}  # fmt: skip


def test_a_whole_history_passes() -> None:
    assert check(WHOLE) == []


@pytest.mark.parametrize("name", BAD)
def test_a_bad_history_is_caught_by_its_check(name: str) -> None:
    expected, history = BAD[name]
    assert expected in {violation.check for violation in check(history)}


def test_letters_that_were_applied_pass() -> None:
    """The log's letters have no record in Kafka to be compared with."""
    of_the_log = replace(LETTER, consumer=LOG_CONSUMER, digest=b"as the log writes it", offset=7)
    assert check(replace(WHOLE, letters=[LETTER, of_the_log])) == []


def test_a_violation_names_the_event() -> None:
    _, history = BAD["an event never delivered"]
    assert [violation.what for violation in check(history)] == ["in the log and not in Kafka: b4"]


def test_repeats_within_the_bound_pass_and_are_counted() -> None:
    history = replace(WHOLE, delivered=[*RECORDS, _again(RECORDS[0])], limits=Limits(kills=1, in_flight=1))
    assert check(history) == []
    assert duplicates(history) == 1


def test_an_unknown_outcome_may_be_either_but_whole() -> None:
    both = replace(WHOLE, known=Known(units=(frozenset({"a1", "a2"}), frozenset({"no", "never"}))))
    assert check(both) == []


def test_an_asynchronous_commit_may_be_lost_by_a_crash_only() -> None:
    weak = replace(WHOLE, known=replace(WHOLE.known, weak=frozenset({"lost"})))
    assert {violation.check for violation in check(weak)} == {"acknowledged"}
    assert check(replace(weak, limits=Limits(crashes=1))) == []


def test_what_a_promotion_took_is_counted_and_the_survivors_are_judged() -> None:
    ghost = _again(RECORDS[0], event_id="ghost", version=5)
    promotion = Promotion(frozenset({"ghost"}), {0: 101, 1: 101})
    history = replace(
        WHOLE,
        known=replace(WHOLE.known, committed=WHOLE.known.committed | {"ghost"}),
        delivered=[*RECORDS, ghost, replace(RECORDS[0], offset=102)],
        effects={CONSUMER: [*EFFECTS, Effect("ghost", "a", 5, 4)]},
        limits=Limits(exactly_once=True, promotion=promotion),
    )
    assert check(history) == []
    assert lost_by_promotion(history) == {"ghost"}
    twice = replace(history, effects={CONSUMER: [*(history.effects[CONSUMER]), EFFECTS[0]]})
    assert {violation.check for violation in check(twice)} == {"effects", "effect order"}


def test_an_event_that_was_lost_by_a_promotion_may_be_written_again_under_its_id() -> None:
    """Its record of the lost history has another version; the effect is that record's, once."""
    old = replace(RECORDS[-1], version=9, digest=b"old life", offset=50)
    event_id = old.event_id
    born_again = [replace(record, offset=102) if record.event_id == event_id else record for record in RECORDS]
    effects = [replace(e, version=9) if e.event_id == event_id else e for e in EFFECTS]
    history = replace(
        WHOLE,
        delivered=[*RECORDS[:-1], old, *[record for record in born_again if record.event_id == event_id]],
        effects={CONSUMER: effects},
        limits=Limits(promotion=Promotion(frozenset({event_id}), {old.partition: 101})),
    )
    assert check(history) == []
    survivor = replace(history, limits=Limits(promotion=Promotion(frozenset(), {old.partition: 101})))
    assert {"order", "identity"} <= {violation.check for violation in check(survivor)}
    twice = replace(history, effects={CONSUMER: [*effects, EFFECTS[-1]]})
    assert "effects" in {violation.check for violation in check(twice)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("exactly_once", [False, True], ids=["at-least-once", "exactly-once"])
def test_ten_seconds_of_torture(exactly_once: bool) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    reports = run.run(run.Plan(10.0, seed, exactly_once=exactly_once))
    for report in reports:
        show(report)
        assert report.ok, f"seed {seed}: " + "; ".join(map(str, report.violations[:10]))


@pytest.mark.timeout(300)
def test_a_short_rebalance_storm() -> None:
    """The long one is ``make storm``. Here nothing is said of speed: only that no effect is missing or happens twice."""
    found = storm.weather(12.0, random.SystemRandom().randrange(1_000_000), members=4)
    storm.show(found)
    assert not found.violations, f"seed {found.seed}"
    assert sum(found.moves.values()) >= 6
