"""What a person may ask of a saga, and the entries that follow. No I/O."""

from __future__ import annotations

from typing import Final

from soma_common.errors import WrongSagaState
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.models import Saga
from soma_common.temporal.messages import Verb

RETRY: Final = "retry"
SKIP: Final = "skip"
RESOLVE: Final = "resolve"


def at_stuck(kind: str, verb: Verb, saga: Saga, journal: Journal, stuck: str | None) -> str:
    """The step at which somebody may retry, skip or resolve.

    Raises:
        WrongSagaState: there is none, or the verb says nothing that fits.
    """
    _check_named(verb)
    if stuck is None:
        raise WrongSagaState("The saga is not stuck.", cure="look at its journal: it goes on by itself.")
    path = verb.step or stuck
    state = journal.of_step(path)
    hangs = state.undo_failed if journal.turned else (state.failed or state.unknown)
    if not hangs:
        raise WrongSagaState(f"The saga is not stuck at {path or 'a step'}.", cure=f"name the step: {stuck}.")
    if kind == SKIP and not journal.turned and saga.is_needed(path):
        cure = "say it: resolve with happened: true and a result."
        raise WrongSagaState(f"The saga cannot go on without the result of {path}.", cure=cure)
    if kind == RESOLVE and verb.happened is None:
        raise WrongSagaState("It is not said whether it happened.", cure="say happened: true or false.")
    if kind == RESOLVE and journal.turned and not verb.happened:
        raise WrongSagaState(f"{path} is not undone.", cure="retry its compensation, or skip it.")
    return path


def decided(kind: str, verb: Verb, path: str, journal: Journal, result: str | None) -> Entry:
    """The entry by which a stuck saga goes on."""
    number = journal.of_step(path).attempts
    if kind == RETRY:
        what = What.RETRY
    elif kind == SKIP:
        what = What.UNDO_SKIPPED if journal.turned else What.SKIPPED
    elif journal.turned:
        what = What.UNDONE
    else:
        what = What.DONE if verb.happened else What.FAILED
    return Entry(
        what=what, step=path, attempt=number, who=verb.who, why=verb.why,
        result=result.encode() if what is What.DONE and result is not None else None,
        error="it did not happen" if what is What.FAILED else None,
    )  # fmt: skip


def check_compensate(verb: Verb, journal: Journal, stuck: str | None, *, behind_pivot: bool) -> None:
    """Raise WrongSagaState unless the saga can turn around."""
    _check_named(verb)
    if journal.turned:
        raise WrongSagaState("The saga goes back already.")
    if behind_pivot:
        raise WrongSagaState("The saga is behind its pivot: there is no way back.", cure="retry, skip or resolve.")
    if stuck is not None:
        raise WrongSagaState(f"Nobody knows whether {stuck} happened.", cure="resolve it first, with happened: false.")


def _check_named(verb: Verb) -> None:
    if not verb.who.strip() or not verb.why.strip():
        raise WrongSagaState("It is not said who decides this, and why.", cure="say who and why.")
