"""The checker: what writers knew, what the log holds, what Kafka holds and what consumers did must be one story."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from tests.torture.settings import CONSUMER, LOG_CONSUMER

SHOWN = 5  # how many events or keys a violation names


@dataclass(frozen=True, slots=True)
class Logged:
    """An event in the log. ``fact``: its writer put a row of its own beside it; ``follow``: it asks for a follow-up."""

    event_id: str
    key: str
    version: int
    timestamp: datetime
    fact: bool = False
    follow: bool = False
    cause: str | None = None


@dataclass(frozen=True, slots=True)
class Delivered:
    """A record in Kafka; ``digest`` covers its key, value and headers."""

    event_id: str
    key: str
    version: int
    timestamp: datetime
    digest: bytes
    partition: int
    offset: int
    follow_up: bool = False


@dataclass(frozen=True, slots=True)
class Effect:
    """What a consumer's handler wrote, in the order of writing; ``previous``: the key's version it found."""

    event_id: str
    key: str
    version: int
    previous: int


@dataclass(frozen=True, slots=True)
class Letter:
    """A dead letter and where its record came from; ``digest`` as a delivered record's."""

    consumer: str
    status: str
    event_id: str
    error_type: str
    edited: bool
    partition: int
    offset: int
    digest: bytes


@dataclass(frozen=True, slots=True)
class Followed:
    """An event as a reader of the log met it, in its order."""

    event_id: str
    key: str
    version: int


@dataclass(frozen=True, slots=True)
class Known:
    """What the writers know for sure, by event id.

    ``weak``: committed with synchronous_commit=off, so a crash of the database may take it back.
    ``units``: events of one transaction whose outcome nobody learnt: all of them or none.
    """

    committed: frozenset[str] = frozenset()
    absent: frozenset[str] = frozenset()
    weak: frozenset[str] = frozenset()
    units: tuple[frozenset[str], ...] = ()

    @property
    def maybe(self) -> frozenset[str]:
        """Events that may or may not be there."""
        return self.weak.union(*self.units)


@dataclass(frozen=True, slots=True)
class Promotion:
    """A lagging standby took over: which acknowledged events may be gone, and where Kafka's partitions ended."""

    may_be_lost: frozenset[str]
    ends: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the run permits. ``kills`` counts interrupted relay processes, ``in_flight`` their largest batch."""

    exactly_once: bool = False
    kills: int = 0
    in_flight: int = 0
    crashes: int = 0
    promotion: Promotion | None = None


@dataclass(frozen=True, slots=True)
class History:
    """Everything read back. Kafka's records are in the order of their offsets; None: no relay ran. ``effects`` are by
    consumer; ``replayed`` tells by process how many replays it ended, and how many events they read."""

    known: Known
    logged: Sequence[Logged]
    facts: Sequence[str]
    limits: Limits = field(default_factory=Limits)
    delivered: Sequence[Delivered] | None = None
    effects: Mapping[str, Sequence[Effect]] = field(default_factory=dict)
    letters: Sequence[Letter] = ()
    replayed: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    followed: Mapping[str, Sequence[Followed]] = field(default_factory=dict)
    failures: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken promise: which check found it, and the events or keys."""

    check: str
    what: str

    def __str__(self) -> str:
        return f"{self.check}: {self.what}"


def check(history: History) -> list[Violation]:
    """Every broken promise in a history; an empty list is the proof."""
    found: list[Violation] = []
    for name, rule in RULES.items():
        found += [Violation(name, what) for what in rule(history)]
    return found


def duplicates(history: History) -> int:
    """Records in Kafka beyond the first of each event; after a promotion those that repeat across it do not count."""
    promotion, repeats = history.limits.promotion, 0
    seen: dict[str, Delivered] = {}
    for record in history.delivered or ():
        first = seen.setdefault(record.event_id, record)
        if first is not record and not (promotion and _across(promotion, first, record)):
            repeats += 1
    return repeats


def lost_by_promotion(history: History) -> frozenset[str]:
    """Acknowledged events that the promoted standby had not received."""
    promotion = history.limits.promotion
    if promotion is None:
        return frozenset()
    return promotion.may_be_lost & history.known.committed - {event.event_id for event in history.logged}


def _across(promotion: Promotion, first: Delivered, again: Delivered) -> bool:
    end = promotion.ends.get(again.partition, 0)
    return first.offset < end <= again.offset


def _acknowledged_is_logged(history: History) -> Iterator[str]:
    logged = {event.event_id for event in history.logged}
    gone = history.known.committed - logged - lost_by_promotion(history)
    yield from _named("acknowledged as committed and not in the log", gone)
    if not history.limits.crashes:
        yield from _named("acknowledged (asynchronously) and not in the log", history.known.weak - logged)


def _rolled_back_is_nowhere(history: History) -> Iterator[str]:
    places: dict[str, Iterable[str]] = {
        "the log": (event.event_id for event in history.logged),
        "the fact rows": history.facts,
        "Kafka": (record.event_id for record in history.delivered or ()),
        "the effects": (effect.event_id for effects in history.effects.values() for effect in effects),
    }
    for place, ids in places.items():
        yield from _named(f"rolled back and present in {place}", history.known.absent & set(ids))


def _units_are_whole(history: History) -> Iterator[str]:
    logged = {event.event_id for event in history.logged}
    for unit in history.known.units:
        there = unit & logged
        if there and there != unit:
            yield from _named("half a transaction: missing", unit - there)


def _facts_are_the_log(history: History) -> Iterator[str]:
    logged, facts = Counter(e.event_id for e in history.logged if e.fact), Counter(history.facts)
    yield from _named("in the log without its fact row", (logged - facts).keys())
    yield from _named("a fact row without its event", (facts - logged).keys())


def _log_is_sound(history: History) -> Iterator[str]:
    yield from _named("twice in the log", _repeated(event.event_id for event in history.logged))
    for key, events in _by_key(history.logged).items():
        events = sorted(events, key=lambda event: event.version)
        if [event.version for event in events] != list(range(1, len(events) + 1)):
            yield f"the log's versions of {key} are not 1..{len(events)}"
        for before, after in zip(events, events[1:], strict=False):
            if before.timestamp >= after.timestamp:
                yield f"timestamps of {key} do not rise from version {before.version} to {after.version}"


def _log_is_in_kafka(history: History) -> Iterator[str]:
    if history.delivered is None:
        return
    logged = {event.event_id: event for event in history.logged}
    delivered = {record.event_id: record for record in history.delivered}
    yield from _named("in the log and not in Kafka", logged.keys() - delivered.keys())
    yield from _named("in Kafka and not in the log", delivered.keys() - logged.keys() - _excused(history))
    for event_id in logged.keys() & delivered.keys():
        event, record = logged[event_id], delivered[event_id]
        if (event.key, event.version, event.timestamp) != (record.key, record.version, record.timestamp):
            yield f"{event_id} of {event.key} differs between the log and Kafka"


def _kafka_keeps_order(history: History) -> Iterator[str]:
    logged, reborn = {event.event_id for event in history.logged}, _reborn(history)
    last: dict[str, int] = defaultdict(int)
    home: dict[str, int] = {}
    seen: set[str] = set()
    for record in history.delivered or ():
        if home.setdefault(record.key, record.partition) != record.partition:
            yield f"{record.key} is in partitions {home[record.key]} and {record.partition}"
        if record.event_id in seen or record.event_id not in logged:
            continue
        if _is_former_life(record, reborn):
            continue
        seen.add(record.event_id)
        if record.version != last[record.key] + 1:
            yield f"{record.key}: version {record.version} ({record.event_id}) first comes after {last[record.key]}"
        last[record.key] = max(last[record.key], record.version)


def _repeats_are_identical(history: History) -> Iterator[str]:
    first: dict[str, Delivered] = {}
    reborn = _reborn(history)
    for record in history.delivered or ():
        if _is_former_life(record, reborn):
            continue
        before = first.setdefault(record.event_id, record)
        if before.digest != record.digest:
            where = f"{record.partition}/{record.offset}"
            yield f"{record.event_id} of {record.key} is repeated with other bytes at {where}"


def _few_repeats(history: History) -> Iterator[str]:
    limits, repeats = history.limits, duplicates(history)
    allowed = 0 if limits.exactly_once else limits.kills * limits.in_flight
    if repeats > allowed:
        again = _repeated(record.event_id for record in history.delivered or ())
        yield from _named(f"{repeats} duplicates where {allowed} are allowed", again)


def _effects_are_once(history: History) -> Iterator[str]:
    logged = {event.event_id for event in history.logged}
    for consumer, effects in history.effects.items():
        counts = Counter(effect.event_id for effect in effects)
        again = (event_id for event_id, times in counts.items() if times > 1 and event_id in logged)
        yield from _named(f"applied by {consumer} more than once", again)
        yield from _named(f"in the log and never applied by {consumer}", logged - counts.keys())
        yield from _named(f"applied by {consumer} and not in the log", counts.keys() - logged - _excused(history))


def _effects_keep_order(history: History) -> Iterator[str]:
    logged, reborn = {event.event_id for event in history.logged}, _reborn(history)
    elsewhere = {(event.key, event.version) for event in reborn.values()}
    last: dict[str, int] = defaultdict(int)
    for consumer, effects in history.effects.items():
        last.clear()
        for effect in effects:
            if effect.event_id not in logged or effect.event_id in reborn:
                continue
            found = last[effect.key]
            while (effect.key, found + 1) in elsewhere:
                found += 1
            if effect.version != found + 1:
                yield f"{effect.key}: version {effect.version} was applied by {consumer} after {found}"
            if history.limits.promotion is None and effect.previous != effect.version - 1:
                yield f"{effect.key}: {consumer}'s handler of version {effect.version} found {effect.previous}"
            last[effect.key] = max(found, effect.version)


def _letters_are_settled(history: History) -> Iterator[str]:
    """Each was applied in the end (once, says another check), and is the record that Kafka holds, byte for byte."""
    there = {(record.partition, record.offset): record.digest for record in history.delivered or ()}
    for consumer, kafka in ((CONSUMER, True), (LOG_CONSUMER, False)):
        letters = [letter for letter in history.letters if letter.consumer == consumer]
        yield from _named(f"dead letters of {consumer} left", (x.event_id for x in letters if x.status != "resolved"))
        changed = (x.event_id for x in letters if kafka and there.get((x.partition, x.offset)) != x.digest)
        yield from _named(f"dead letters of {consumer} that are not Kafka's record", changed)


def _follow_ups(history: History) -> Iterator[str]:
    if CONSUMER not in history.effects:
        return
    asked = {event.event_id for event in history.logged if event.follow}
    answered = Counter(event.cause for event in history.logged if event.cause is not None)
    yield from _named("without its follow-up", asked - answered.keys())
    yield from _named("with several follow-ups", (cause for cause, times in answered.items() if cause and times > 1))
    if history.limits.promotion is None:
        yield from _named("a follow-up of nothing", answered.keys() - asked)


def _readers_see_the_log(history: History) -> Iterator[str]:
    logged = {event.event_id for event in history.logged}
    for name, events in history.followed.items():
        met = Counter(event.event_id for event in events)
        yield from _named(f"missed by {name}", logged - met.keys())
        yield from _named(f"met twice by {name}", (event_id for event_id, times in met.items() if times > 1))
        yield from _named(f"met by {name} and not in the log", met.keys() - logged - _excused(history))
        last: dict[str, int] = defaultdict(int)
        for event in events:
            if event.event_id in logged and event.version != last[event.key] + 1:
                yield f"{name} met version {event.version} of {event.key} after {last[event.key]}"
            if event.event_id in logged:
                last[event.key] = event.version


def _nothing_failed(history: History) -> Iterator[str]:
    yield from history.failures


RULES: Mapping[str, Callable[[History], Iterator[str]]] = {
    "acknowledged": _acknowledged_is_logged,
    "rolled back": _rolled_back_is_nowhere,
    "whole": _units_are_whole,
    "facts": _facts_are_the_log,
    "log": _log_is_sound,
    "delivery": _log_is_in_kafka,
    "order": _kafka_keeps_order,
    "identity": _repeats_are_identical,
    "duplicates": _few_repeats,
    "effects": _effects_are_once,
    "effect order": _effects_keep_order,
    "letters": _letters_are_settled,
    "follow-ups": _follow_ups,
    "readers": _readers_see_the_log,
    "processes": _nothing_failed,
}


def _excused(history: History) -> frozenset[str] | set[str]:
    """Events that left the database before a promotion took them away."""
    if history.limits.promotion is None:
        return frozenset()
    return history.limits.promotion.may_be_lost - history.known.absent


def _reborn(history: History) -> dict[str, Logged]:
    """Events with two lives: relayed, lost with the old primary, and written again under the same id by a writer that
    had not learnt the outcome. Consumers apply the first life that they meet, which has another version and place."""
    promotion = history.limits.promotion
    if promotion is None:
        return {}
    logged = {event.event_id: event for event in history.logged if event.event_id in promotion.may_be_lost}
    return {
        record.event_id: logged[record.event_id]
        for record in history.delivered or ()
        if record.event_id in logged
        and record.version != logged[record.event_id].version
        and record.offset < promotion.ends.get(record.partition, 0)
    }


def _is_former_life(record: Delivered, reborn: Mapping[str, Logged]) -> bool:
    event = reborn.get(record.event_id)
    return event is not None and record.version != event.version


def _by_key(events: Sequence[Logged]) -> dict[str, list[Logged]]:
    keys: dict[str, list[Logged]] = defaultdict(list)
    for event in events:
        keys[event.key].append(event)
    return keys


def _repeated(ids: Iterable[str]) -> list[str]:
    return [one for one, times in Counter(ids).items() if times > 1]


def _named(what: str, ids: Iterable[str | None]) -> Iterator[str]:
    """One line for all of them, naming the first few."""
    all_ids = sorted(str(one) for one in ids)
    if all_ids:
        more = f" and {len(all_ids) - SHOWN} more" if len(all_ids) > SHOWN else ""
        yield f"{what}: {', '.join(all_ids[:SHOWN])}{more}"
