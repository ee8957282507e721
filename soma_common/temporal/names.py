"""What activities are called: people read it in Temporal's pages, and its metrics count by it."""

from __future__ import annotations

from collections.abc import Iterator

from soma_common.sagas.models import Saga
from soma_common.sagas.steps import Parallel, SagaStep, SubSaga, walk


def of_step(saga: Saga, step: str, *, undo: bool = False) -> str:
    """Of an action or a rule, or of a step's compensation."""
    return f"{saga.name}.{step}.undo" if undo else f"{saga.name}.{step}"


def of_check(saga: Saga) -> str:
    """Of what looks at a signal's payload, or at a result that a person gave. No step begins with an underscore."""
    return f"{saga.name}._check"


def of_settling(saga: Saga) -> str:
    """Of what finds out whether a transactional step was done."""
    return f"{saga.name}._settle"


def of_steps(saga: Saga) -> Iterator[str]:
    """Of all that a saga may have done, its sub-sagas' steps included."""
    for part in walk(saga.parts):
        if isinstance(part, Parallel):
            continue
        yield of_step(saga, part.name)
        if isinstance(part, SagaStep) and part.compensation is not None:
            yield of_step(saga, part.name, undo=True)
        if isinstance(part, SubSaga):
            yield from of_steps(part.saga)
