"""Which results the function of a step needs: those alone travel to the activity. No I/O, nothing is decoded by types.

A loop is seen from inside of one item: its list is sent with that item only, under the number 0. Else every item's
activity would carry the whole list.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from soma_common.errors import SagaDefinitionError
from soma_common.sagas.journal import NOTHING, Journal
from soma_common.sagas.machine import Work, item_of, length
from soma_common.sagas.models import Saga
from soma_common.sagas.parameters import Call, Kind, Known
from soma_common.sagas.steps import SubSaga

_NULL: Final = "null"


def local(prefix: tuple[str, ...]) -> tuple[str, ...]:
    """The loops and sub-sagas around a step, seen from inside."""
    return tuple(item_of(segment.partition("[")[0], 0) if "[" in segment else segment for segment in prefix)


def needed(call: Call, work: Work, journal: Journal) -> dict[str, str]:
    """The JSON of each result that a function is filled with, by its place as seen from inside."""
    return {place: text for _, known in call.sources for place, text in _of(known, work, journal)}


def needs_input(call: Call, work: Work) -> bool:
    """Whether it takes what the whole saga was started with."""
    return not work.inside and any(known.kind is Kind.INPUT for _, known in call.sources)


def journal_of(results: dict[str, str]) -> Journal:
    """A journal that knows so much."""
    return Journal({place: replace(NOTHING, done=True, result=text.encode()) for place, text in results.items()})


def work_at(saga: Saga, path: str, *, undo: bool) -> Work:
    """The step at a place of the journal.

    Raises:
        SagaDefinitionError: there is none under this definition.
    """
    *prefix, name = path.split("/")
    inside, within = 0, saga
    try:
        for depth, segment in enumerate(prefix, 1):
            if "[" not in segment:
                within, inside = within.by_name[segment].saga, depth
        return Work(within, within.by_name[name], tuple(prefix), inside, undo)
    except (KeyError, AttributeError) as error:
        raise SagaDefinitionError(
            f"{saga!r} has no step {path}.", cure="raise the version of a saga when its steps change."
        ) from error


def _of(known: Known, work: Work, journal: Journal) -> Iterator[tuple[str, str]]:
    depth = work.inside + known.depth
    match known.kind:
        case Kind.INPUT:
            if work.inside:
                yield from _text(work.prefix[: work.inside - 1], work.prefix[work.inside - 1], journal)
        case Kind.OWN:
            yield from _text(work.prefix, known.name, journal)
        case Kind.ITEM:
            yield _item(work.prefix[: depth - 1], work.prefix[depth - 1], journal)
        case Kind.RESULT:
            yield from _result(work.saga, known.name, work.prefix[:depth], local(work.prefix[:depth]), journal)
        case Kind.RESULTS:
            yield from _results(work.saga, known, work.prefix[:depth], journal)
        case _:
            return


def _text(prefix: tuple[str, ...], name: str, journal: Journal) -> Iterator[tuple[str, str]]:
    result = journal.of_step("/".join((*prefix, name))).result
    if result is not None:
        yield "/".join((*local(prefix), name)), result.decode()


def _item(prefix: tuple[str, ...], segment: str, journal: Journal) -> tuple[str, str]:
    loop, _, number = segment[:-1].partition("[")
    items = json.loads(journal.of_step("/".join((*prefix, loop))).result or b"[]")
    return "/".join((*local(prefix), loop)), json.dumps([items[int(number)]])


def _results(saga: Saga, known: Known, base: tuple[str, ...], journal: Journal) -> Iterator[tuple[str, str]]:
    """What a step gave for every item of a loop before; of the loop itself, only its length is wanted."""
    count = length(journal.of_step("/".join((*base, known.loop))))
    yield "/".join((*local(base), known.loop)), json.dumps([None] * count)
    for number in range(count):
        item = item_of(known.loop, number)
        yield from _result(saga, known.name, (*base, item), (*local(base), item), journal)


def _result(
    saga: Saga, name: str, real: tuple[str, ...], seen: tuple[str, ...], journal: Journal
) -> Iterator[tuple[str, str]]:
    """That of a sub-saga is what its last step gave."""
    part = saga.by_name[name]
    if not isinstance(part, SubSaga):
        result = journal.of_step("/".join((*real, name))).result
        if result is not None:
            yield "/".join((*seen, name)), result.decode()
    elif part.saga.returns is not None:
        yield from _result(part.saga, part.saga.returns, (*real, name), (*seen, name), journal)
