"""Judges a torture run of sagas. No I/O: it runs on hand-made histories as well as on real ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from tests.torture.history import Violation
from tests.torture.saga_history import ENDS, Ack, History, Line, Moved, Story, repeats
from tests.torture.saga_plans import Place, posting

_VERBS = {
    "compensate": ("compensate",), "cancel": ("cancel",), "retry": ("retry",), "mend": ("retry",), "letter": ("retry",),
    "skip": ("skipped", "undo-skipped"), "done": ("done", "undone"), "failed": ("failed",),
}  # fmt: skip


def check(history: History) -> list[Violation]:
    """Every broken promise in a history; an empty list is the proof."""
    found = [Violation(name, what) for name, rule in WHOLE.items() for what in rule(history)]
    for story in history.stories:
        for name, each in OF_EACH.items() if story.plan is not None else ():  # else it is named above
            found += [Violation(name, f"{_title(story)}: {what}. {_journal(story)}") for what in each(story)]
    return found


def _title(story: Story) -> str:
    return f"{story.name} {story.key} ({story.saga_id})"


def _journal(story: Story) -> str:
    """What is needed to understand a violation when the database is gone."""
    told = ", ".join(
        f"{line.what} {line.step}".strip() + (f" by {line.who}" if line.who else "") for line in story.lines
    )
    return f"Journal: {told}. Fates: {story.plan.job.fates if story.plan else {}}. Bank: {dict(story.calls)}"


# Of the whole run.


def _what_was_started_is_there(history: History) -> Iterator[str]:
    known, there = history.known, {story.plan.job.number: story for story in history.stories if story.plan}
    times = Counter(story.key for story in history.stories)
    yield from (f"{key} exists {n} times" for key, n in times.items() if n > 1)
    for story in history.stories:
        if story.plan is None or (number := story.plan.job.number) in known.rolled_back or number not in known.tried:
            yield f"nobody started {story.name} {story.key}, or it was rolled back"
        elif story.name != story.plan.name or story.given != asdict(story.plan.job):
            yield f"{story.key} is not what it was started as: {story.name} {story.given}"
    yield from (f"n{number} took another input under its key" for number in known.wrong)
    by_number: dict[int, list[Ack]] = {}
    for ack in known.acks:
        by_number.setdefault(ack.number, []).append(ack)
    for number, acks in by_number.items():
        sure = {ack.saga_id for ack in acks if ack.at < history.moment}
        story_id = there[number].saga_id if number in there else None
        if sure and sure != {story_id}:
            yield f"n{number} was acknowledged as {', '.join(sorted(sure))}, and is {story_id}"


def _ledger_balances(history: History) -> Iterator[str]:
    if entries := sum(account.entries for account in history.accounts):
        yield f"all entries together are {entries} cents, not 0"
    expected: Counter[int] = Counter()
    for story in history.stories:
        for moved in _expected(story) if story.plan else ():
            expected[moved.debit] -= moved.cents
            expected[moved.credit] += moved.cents
    for each in history.accounts:
        if each.balance != each.opening + each.entries:
            yield f"account {each.account} has {each.balance}: it opened with {each.opening} and got {each.entries}"
        if each.entries != expected[each.account]:
            yield f"account {each.account} got {each.entries}, and by the journals {expected[each.account]}"


def _acts_are_in_the_journals(history: History) -> Iterator[str]:
    lines = {(story.saga_id, line.why): line for story in history.stories for line in story.lines if line.who}
    times = Counter(
        (story.saga_id, line.why) for story in history.stories for line in story.lines if line.who and line.why
    )
    acts = {(act.saga_id, act.why): act for act in history.known.acts}
    for place, act in acts.items():
        found = times[place]
        if found and lines[place].what not in _VERBS[act.verb]:
            yield f"{act.verb} of {act.saga_id} ({act.why}) stands there as {lines[place].what}"
        if found > 1 or (act.answer == "ok" and not found and act.at < history.moment):
            yield f"{act.verb} of {act.saga_id} ({act.why}) stands there {found} times"
        if found and act.answer in ("no", "asked"):
            yield f"{act.verb} of {act.saga_id} ({act.why}) was refused, and stands there"
    yield from (f"nobody did {why} to {saga_id}" for saga_id, why in times if (saga_id, why) not in acts)


def _signals_are_kept(history: History) -> Iterator[str]:
    kept = {(story.saga_id, sent.payload) for story in history.stories for sent in story.signals}
    for told in history.known.signals:
        if (told.saga_id, told.coin) not in kept and told.at < history.moment:
            yield f"coin {told.coin} of {told.saga_id} was acknowledged and is not there"


def _repeats_have_a_bound(history: History) -> Iterator[str]:
    found, most = sum(map(repeats, history.stories)), history.interruptions * history.at_once
    if found > most:
        yield f"{found} calls were repeated, at most {most} may be"


def _processes_ran(history: History) -> Iterator[str]:
    yield from history.failures


# Of each saga.


def _it_ended(story: Story) -> Iterator[str]:
    if story.status not in ENDS:
        yield f"is {story.status}"


def _journal_is_whole(story: Story) -> Iterator[str]:
    lines = story.lines
    if [line.number for line in lines] != list(range(1, story.length + 1)):
        yield f"entries {[line.number for line in lines]} of {story.length}"
    epochs = [line.epoch for line in lines]
    if epochs != sorted(epochs):
        yield f"epochs {epochs}"
    last = lines[-1].what if lines else ""
    ended = story.steps("ended")
    if len(ended) != (story.status in ("completed", "compensated")) or (ended and last != "ended"):
        yield f"is {story.status}, and ended {len(ended)} times, at last {last}"
    if story.status == "stuck" and last != "stuck":
        yield f"is stuck, at last {last}"
    yield from (f"{path} was done {n} times" for path, n in Counter(story.steps("done", "skipped")).items() if n > 1)
    if len(story.steps("turned")) > 1:
        yield "turned twice"
    known = {place.path for place in story.places} | {""}
    yield from (f"{path} is no step" for path in {line.step for line in lines} - known)


def _letters_are_of_the_stuck(story: Story) -> Iterator[str]:
    if story.open_letters != (story.status == "stuck"):
        yield f"is {story.status} with {story.open_letters} open letters"
    if story.letters != len(story.steps("stuck")):
        yield f"was stuck {len(story.steps('stuck'))} times with {story.letters} letters"


def _it_is_done_or_undone(story: Story) -> Iterator[str]:
    """Everything is done and nothing undone; or what was done is undone in exactly the reverse order."""
    done, turned = story.steps("done", "skipped"), bool(story.steps("turned"))
    undone = story.steps("undone", "undo-skipped")
    if not turned:
        if undone:
            yield f"never turned, and undid {undone}"
        if story.status == "completed" and (missing := {place.path for place in story.places} - set(done)):
            yield f"completed without {sorted(missing)}"
        if story.status == "compensated":
            yield "is compensated and never turned"
        if story.status == "stuck" and not _is_one_way(story, done):
            yield "is stuck before its pivot"
        return
    if story.status == "completed":
        yield "turned and completed"
    if _is_one_way(story, done):
        yield "turned behind its pivot"
    expected = [place.path for place in reversed(story.places) if _is_to_undo(story, place)]
    if undone != expected[: len(undone)] or (story.status == "compensated" and len(undone) < len(expected)):
        yield f"undid {undone}, not {expected}"
    turn = next(line.number for line in story.lines if line.what == "turned")
    if late := [line.step for line in story.lines if line.number > turn and line.what in ("done", "skipped")]:
        yield f"did {late} after it turned"


def _is_one_way(story: Story, done: list[str]) -> bool:
    return any(place.pivot and place.path in done for place in story.places)


def _is_to_undo(story: Story, place: Place) -> bool:
    unknown = place.kind == "careful" and place.path in story.steps("unknown")
    return place.undo and (place.path in story.steps("done") or unknown)


def _failures_have_a_reason(story: Story) -> Iterator[str]:
    asked = {line.what for line in story.lines if line.who}
    for line in story.lines:
        if line.what == "failed" and not line.who and not _may_fail(story, line, asked):
            yield f"{line.step} failed by {line.error}"
        if line.what == "undo-failed" and story.fate(f"{line.step}:undo") != "broken":
            yield f"the compensation of {line.step} failed by {line.error}"
        if line.what == "turned" and line.why not in asked and line.why not in story.steps("failed"):
            yield f"turned because of {line.why}"
    certain = {p.path for p in story.places if story.fate(p.path) == "refused" or _is_lost(story, p)}
    yield from (f"{path} cannot be done" for path in certain & set(story.steps("done", by_worker=True)))


def _may_fail(story: Story, line: Line, asked: set[str]) -> bool:
    kind = next(place.kind for place in story.places if place.path == line.step)
    if line.error.endswith("StepRefused"):
        return story.fate(line.step) in ("refused", "broken")
    if kind == "signal":
        return line.error.endswith("TimeoutError")
    # Its worker died, its answer was lost, or it was cancelled.
    return kind == "careful" and (line.error.endswith("OutcomeUnknown") or "cancel" in asked)


def _is_lost(story: Story, place: Place) -> bool:
    return place.kind == "careful" and story.fate(place.path) == "lost"


def _expected(story: Story) -> Iterator[Moved]:
    """What the journal says that the saga did to the ledger."""
    assert story.plan is not None
    transactional = {place.path for place in story.places if place.kind == "tx"}
    coins = {line.step: line.result or 0 for line in story.lines if line.what == "done"}
    for line in story.lines:
        if line.what in ("done", "undone") and not line.who and line.step in transactional:
            coin = coins.get(f"{line.step.rpartition('/')[0]}/coin", 0)
            moved = posting(story.name, story.plan.job, line.step, coin)
            if line.what == "done":
                yield Moved(line.step, False, *moved)
            else:
                yield Moved(line.step, True, moved.credit, moved.debit, moved.cents)


def _effects_are_those_of_the_journal(story: Story) -> Iterator[str]:
    expected, found = Counter(_expected(story)), Counter(story.moved)
    for moved in (expected - found) + (found - expected):
        yield f"{moved.step}{' undone' if moved.undo else ''}: {found[moved]} in the ledger, {expected[moved]} by the journal"
    undos, transactional = [m.step for m in story.moved if m.undo], {p.path for p in story.places if p.kind == "tx"}
    if undos != (told := [step for step in story.steps("undone", by_worker=True) if step in transactional]):
        yield f"the ledger was undone as {undos}, and by the journal as {told}"
    directions = [moved.undo for moved in story.moved]
    if directions != sorted(directions):
        yield "something was done after an undo"


def _events_are_those_of_the_effects(story: Story) -> Iterator[str]:
    expected = Counter(f"{story.saga_id}:{m.step}{':undo' if m.undo else ''}" for m in _expected(story))
    found = Counter(story.events)
    for cause in (expected - found) + (found - expected):
        yield f"{cause.partition(':')[2]}: {found[cause]} events, not {expected[cause]}"


def _bank_agrees(story: Story) -> Iterator[str]:
    assert story.plan is not None
    done, undone = story.steps("done", by_worker=True), story.steps("undone", by_worker=True)
    by_hand = set(story.steps("undone", "undo-skipped")) - set(undone)
    for place in story.places:
        called = story.calls.get(place.path)
        if called is None:
            if place.kind in ("bank", "careful") and place.path in done:
                yield f"{place.path} is done, and the bank knows nothing of it"
            continue
        if called.clash:
            yield f"{place.path}: one key with two amounts"
        net = called.charged - called.refunded
        if place.path in done and place.path not in undone and net != story.plan.job.cents:
            yield f"{place.path} is done, and the bank has {net} cents"
        is_clear = place.path in undone or (story.status == "compensated" and place.path not in by_hand)
        if is_clear and net and not place.pivot:
            yield f"{place.path} was not given back: {net} cents"
        if place.pivot and called.charges and story.status == "compensated":
            yield f"{place.path}, a pivot, may have happened, and the saga turned"
        if place.kind == "careful" and called.charges > len([s for s in story.steps("begun") if s == place.path]):
            yield f"{place.path} was called {called.charges} times, and began {story.steps('begun').count(place.path)} times"


def _signals_are_taken_once(story: Story) -> Iterator[str]:
    taken = Counter(sent.taken for sent in story.signals if sent.taken)
    yield from (f"entry {number} took {n} signals" for number, n in taken.items() if n > 1)
    by_entry = {sent.taken: sent.payload for sent in story.signals if sent.taken}
    coins = [place.path for place in story.places if place.kind == "signal"]
    lines = {line.number: line for line in story.lines if line.what == "done" and line.step in coins}
    for number in lines.keys() | by_entry.keys():
        said = lines[number].result if number in lines else None
        if number not in by_entry or said != by_entry[number]:
            yield f"entry {number} got {said}, and the signal it took is {by_entry.get(number)}"


WHOLE: Mapping[str, Callable[[History], Iterator[str]]] = {
    "started": _what_was_started_is_there,
    "ledger": _ledger_balances,
    "audit": _acts_are_in_the_journals,
    "signals kept": _signals_are_kept,
    "repeats": _repeats_have_a_bound,
    "processes": _processes_ran,
}
OF_EACH: Mapping[str, Callable[[Story], Iterator[str]]] = {
    "ends": _it_ended,
    "journal": _journal_is_whole,
    "letters": _letters_are_of_the_stuck,
    "done or undone": _it_is_done_or_undone,
    "reasons": _failures_have_a_reason,
    "effects": _effects_are_those_of_the_journal,
    "events": _events_are_those_of_the_effects,
    "bank": _bank_agrees,
    "signals": _signals_are_taken_once,
}
RULES = (*WHOLE, *OF_EACH)
