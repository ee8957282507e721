"""What travels to an activity is all that its function is filled with, and no more."""

from __future__ import annotations

import pytest

from soma_common.errors import SagaDefinitionError
from soma_common.sagas.journal import Entry, Journal, What
from soma_common.sagas.machine import Work, decide
from soma_common.sagas.models import Saga
from soma_common.sagas.steps import Signal, SubSaga, Timer
from soma_common.sagas.values import Values, encode
from soma_common.temporal.needs import journal_of, local, needed, needs_input, work_at
from tests.temporal_sagas import Order, everything, long_loop, outer, place_order

SAGAS = [everything(), long_loop, outer, place_order]


def seen_and_known(saga: Saga, work: Work, given: bytes, journal: Journal) -> tuple[object, object]:
    """What a function is called with by what travels, and by the whole journal."""
    call = work.saga.undos[work.part.name] if work.undo else work.saga.calls[work.part.name]
    results = needed(call, work, journal)
    travelled = given if needs_input(call, work) else b"null"
    inside = work_at(saga, work.path, undo=work.undo)
    assert inside == work
    seen = Values(saga, travelled).arguments(
        call, inside._replace(prefix=local(work.prefix)), journal_of(results), tx=None, context=None
    )
    return seen, Values(saga, given).arguments(call, work, journal, tx=None, context=None)


@pytest.mark.parametrize("saga", SAGAS, ids=lambda saga: saga.name)
def test_a_function_gets_the_same_as_from_the_whole_journal(saga: Saga, tmp_path: object) -> None:
    given = encode(saga.input, Order(folder=str(tmp_path), items=["cup", "can", "jar"], gift=True), "input")
    journal, called = Journal(), 0
    while begin := decide(saga, journal).begin:
        for work in begin:
            if isinstance(work.part, Signal | Timer):
                journal = journal.after(Entry(what=What.DONE, step=work.path, result=b'"yes"'))
                continue
            seen, known = seen_and_known(saga, work, given, journal)
            assert seen == known
            called += 1
            journal = journal.after(Entry(what=What.DONE, step=work.path, result=sample(work)))
    for work in everything_done(saga, journal):
        if work.part.name in work.saga.undos:
            seen, known = seen_and_known(saga, work, given, journal)
            assert seen == known
            called += 1
    assert called > 3


def sample(work: Work) -> bytes:
    """A result of the step's type."""
    adapter = work.part.saga.input if isinstance(work.part, SubSaga) else work.saga.results[work.part.name]
    for text in (
        b"true",
        b'"text"',
        b'["cup","can","jar"]',
        b"[1,2,3]",
        b'{"number":7}',
        b'{"reference":"r"}',
        b"5",
        b"null",
    ):
        try:
            adapter.validate_json(text, strict=True)
        except ValueError:
            continue
        return text
    raise AssertionError(work.path)


def everything_done(saga: Saga, journal: Journal) -> list[Work]:
    """The compensations, in their order."""
    works, journal = list[Work](), journal.after(Entry(what=What.TURNED))
    while begin := decide(saga, journal).begin:
        works += begin
        journal = journal.after(*(Entry(what=What.UNDONE, step=work.path) for work in begin))
    return works


def test_an_item_travels_alone() -> None:
    text = encode(long_loop.results["many"], list(range(1000)), "items")
    journal = Journal().after(Entry(what=What.DONE, step="many", result=text))
    work = work_at(long_loop, "many[700]/one", undo=False)
    assert needed(work.saga.calls["one"], work, journal) == {"many": "[700]"}


@pytest.mark.parametrize("path", ["nothing", "many/one", "many[0]/nothing", "total/one", "total[0]"])
def test_a_path_that_is_not_in_the_definition(path: str) -> None:
    if path == "many/one":
        path = "one/many"
    with pytest.raises(SagaDefinitionError, match="has no step"):
        work_at(long_loop, path, undo=False)
