"""The parts a saga is made of. Each is a value with a name, under which the journal tells what became of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final, TypeVar

from soma_common.errors import SagaDefinitionError
from soma_common.ranges import check_settings
from soma_common.retry import Backoff
from soma_common.sagas.parameters import INPUT, Function

_NAME = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_COMPENSATION: Final = "__soma_compensation__"
MOST_ITEMS: Final = 1000

Declared = TypeVar("Declared", bound=Callable[..., Any])


class Unknown(StrEnum):
    """What to do when nobody knows whether an external step took effect: its process died, or it took too long.

    ``retry``: try it again under the same key, until it is known or its retries are used up. ``compensate``: undo it,
    and all before it. ``ask``: the saga is stuck until a person says what happened (``resolve``).
    """

    RETRY = "retry"
    COMPENSATE = "compensate"
    ASK = "ask"


def with_compensation(undo: Callable[..., Any]) -> Callable[[Declared], Declared]:
    """Declare how the effect of a step is undone. The decorated function stays as it is.

    ``undo`` is matched by annotation like the action; besides, it may take the action's result.
    """

    def declare(action: Declared) -> Declared:
        setattr(action, _COMPENSATION, undo)
        return action

    return declare


def compensation_of(action: Function) -> Function | None:
    """What ``@with_compensation`` declared, if it did."""
    declared: Function | None = getattr(action, _COMPENSATION, None)
    return declared


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoPolicy:
    """How a compensation is tried. After ``max_retries`` failures more the saga is stuck, with a dead letter."""

    timeout_seconds: float = 30.0
    max_retries: int = 10
    retry: Backoff = field(default_factory=lambda: Backoff(base=0.2, maximum=30.0))

    def __post_init__(self) -> None:
        check_settings(self, timeout_seconds=(0.001, 31 * 86_400.0), max_retries=(0, 10_000), retry=Backoff)


@dataclass(frozen=True, slots=True)
class SagaStep:
    """An action, and how it is undone.

    An action with a parameter of type :class:`Tx` is transactional: its effects, its events, its result and the mark
    that it is done commit together, once. Any other is external: it may be called again with the same ``ctx.key``.

    Args:
        action: ``async def``, or a plain function, which runs in a thread.
        compensation: undoes it; that of ``@with_compensation`` where it is left out. None: there is nothing to undo.
        name: in the journal; the function's where it is left out.
        timeout_seconds: for one attempt; then it is cancelled.
        max_retries: how often it is tried again after it failed.
        retry: waits between attempts.
        pivot: after it there is no way back: what follows is done, or waits for a person.
        unknown: what to do when nobody knows whether it took effect.
        fatal: errors after which it is not tried again, beside ``StepRefused`` and the library's ``ValidationError``.
        undo: how the compensation is tried.
    """

    action: Function
    compensation: Function | None = None
    name: str = field(default="", kw_only=True)
    timeout_seconds: float = field(default=30.0, kw_only=True)
    max_retries: int = field(default=3, kw_only=True)
    retry: Backoff = field(default_factory=lambda: Backoff(base=0.2, maximum=30.0), kw_only=True)
    pivot: bool = field(default=False, kw_only=True)
    unknown: Unknown = field(default=Unknown.RETRY, kw_only=True)
    fatal: tuple[type[BaseException], ...] = field(default=(), kw_only=True)
    undo: UndoPolicy = field(default_factory=UndoPolicy, kw_only=True)

    def __post_init__(self) -> None:
        fill = object.__setattr__
        fill(self, "name", step_name(self.name, self.action))
        if self.compensation is None:
            fill(self, "compensation", compensation_of(self.action))
        check_settings(
            self, timeout_seconds=(0.001, 31 * 86_400.0), max_retries=(0, 10_000), retry=Backoff, undo=UndoPolicy,
        )  # fmt: skip
        fill(self, "unknown", _unknown(self.unknown, self.name))
        if not all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in self.fatal):
            raise SagaDefinitionError(f"Step {self.name}: fatal={self.fatal!r:.100}.", cure="name classes of errors.")
        self._check_pivot()

    def _check_pivot(self) -> None:
        if self.pivot and self.compensation is not None and self.unknown is not Unknown.COMPENSATE:
            raise SagaDefinitionError(
                f"Step {self.name} is a pivot, and its compensation would never be called.",
                cure='leave it away; or say unknown="compensate".',
            )
        if self.unknown is Unknown.COMPENSATE and self.compensation is None:
            raise SagaDefinitionError(
                f'Step {self.name} has unknown="compensate" and no compensation.', cure="give it one."
            )


@dataclass(frozen=True, slots=True, init=False)
class Parallel:
    """Branches that run side by side: a step each, or a list of steps that follow each other.

    When one fails, those at work are let end, none begins anew, and what was done is undone, the last branch first.
    """

    branches: tuple[tuple[Part, ...], ...]

    def __init__(self, *branches: Given | Sequence[Given]) -> None:
        if len(branches) < 2:
            raise SagaDefinitionError(f"A parallel group has {len(branches)} branches.", cure="give it two or more.")
        object.__setattr__(self, "branches", tuple(parts_of(branch) for branch in branches))


@dataclass(frozen=True, slots=True, init=False)
class When:
    """Steps that are done only when a condition holds; ``otherwise`` are done when it does not.

    The condition is asked once, and its answer kept in the journal. It must decide from what it is given.
    """

    condition: Function
    then: tuple[Part, ...]
    otherwise: tuple[Part, ...]
    name: str

    def __init__(
        self, condition: Function, *then: Given, otherwise: Given | Sequence[Given] = (), name: str = ""
    ) -> None:
        fill = object.__setattr__
        fill(self, "condition", condition)
        fill(self, "name", step_name(name, condition))
        fill(self, "then", parts_of(then, empty=True))
        fill(self, "otherwise", parts_of(otherwise, empty=True))
        if not self.then and not self.otherwise:
            raise SagaDefinitionError(f"Condition {self.name} decides nothing.", cure="give it steps.")


@dataclass(frozen=True, slots=True, init=False)
class ForEach:
    """Steps that are done for every item of a list, which is known when the saga comes here.

    The list is asked for once and kept in the journal. In order, or ``at_once`` items side by side; undone from the
    last item to the first. At most 1,000 items.
    """

    items: Function
    body: tuple[Part, ...]
    at_once: int
    name: str

    def __init__(self, items: Function, *body: Given, at_once: int = 1, name: str = "") -> None:
        fill = object.__setattr__
        fill(self, "items", items)
        fill(self, "name", step_name(name, items))
        fill(self, "body", parts_of(body))
        fill(self, "at_once", at_once)
        check_settings(self, at_once=(1, MOST_ITEMS))


@dataclass(frozen=True, slots=True)
class Timer:
    """Waits: so many seconds, or what a function says (seconds, a timedelta, or a moment with a time zone)."""

    name: str
    wait: float | Function

    def __post_init__(self) -> None:
        _check_name(self.name)
        if not callable(self.wait):
            check_settings(self, wait=(0.0, 10 * 365 * 86_400.0))


@dataclass(frozen=True, slots=True)
class Signal:
    """Waits for ``signal(saga_id, name, payload)``. One that came early is kept until the saga comes here.

    ``timeout_seconds``: after which the step fails; None: the saga's deadline ends the wait. With ``optional`` it does
    not fail then, and gives None.
    """

    name: str
    payload: Any = None
    timeout_seconds: float | None = field(default=None, kw_only=True)
    optional: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        _check_name(self.name)
        if self.timeout_seconds is not None:
            check_settings(self, timeout_seconds=(0.001, 10 * 365 * 86_400.0))
        if self.optional and self.timeout_seconds is None:
            raise SagaDefinitionError(f"Signal {self.name} is optional without end.", cure="give timeout_seconds.")


@dataclass(frozen=True, slots=True)
class SubSaga:
    """Another saga as a part of this one, with its own journal paths. Its deadline is that of the whole.

    ``input``: a function that makes what it is started with; left out, a value of its input's type must be known here.
    """

    saga: Any
    input: Function | None = None
    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or getattr(self.saga, "name", ""))
        _check_name(self.name)


@dataclass(frozen=True, slots=True)
class Ask:
    """Asks another service: sends a command by an event, and waits for its reply.

    The other service answers by ``reply(command, result)`` or ``refusal(command, ...)``, of ``sagas.replies``, in the
    transaction of its handler. Delivery is the outbox's and the inbox's: nothing is sent twice by hand. One that
    comes early is kept, a second one and one that comes too late change nothing.

    Args:
        name: in the journal.
        command: a plain function that makes the event: from the input and from results of earlier steps.
        reply: the type of what is answered.
        compensation: makes the event that takes the command back; also sent when no reply came in time.
        timeout_seconds: after which it has failed; None: the saga's deadline ends the wait.
    """

    name: str
    command: Function
    reply: Any = None
    compensation: Function | None = field(default=None, kw_only=True)
    timeout_seconds: float | None = field(default=None, kw_only=True)
    undo: UndoPolicy = field(default_factory=UndoPolicy, kw_only=True)

    def __post_init__(self) -> None:
        _check_name(self.name)
        check_settings(self, undo=UndoPolicy)
        if self.timeout_seconds is not None:
            check_settings(self, timeout_seconds=(0.001, 10 * 365 * 86_400.0))


Part = SagaStep | Parallel | When | ForEach | Timer | Signal | SubSaga | Ask
Given = Part | Function
_PARTS: Final = (SagaStep, Parallel, When, ForEach, Timer, Signal, SubSaga, Ask)


def parts_of(given: Any, *, empty: bool = False) -> tuple[Part, ...]:
    """Parts in their order; a plain function stands for its step.

    Raises:
        SagaDefinitionError: something is none, or there are none.
    """
    several = given if isinstance(given, list | tuple) else (given,)
    if not several and not empty:
        raise SagaDefinitionError("There are no steps.", cure="name one at least.")
    return tuple(_part(each) for each in several)


def walk(parts: Sequence[Part]) -> Iterator[Part]:
    """All parts, with those inside of others, but not inside of sub-sagas."""
    for part in parts:
        yield part
        for inner in _inside(part):
            yield from walk(inner)


def _inside(part: Part) -> tuple[tuple[Part, ...], ...]:
    match part:
        case Parallel():
            return part.branches
        case When():
            return (part.then, part.otherwise)
        case ForEach():
            return (part.body,)
        case _:
            return ()


def _part(given: Any) -> Part:
    if isinstance(given, _PARTS):
        return given
    if hasattr(given, "parts") and hasattr(given, "input_type"):
        return SubSaga(given)
    if not callable(given) or isinstance(given, type):
        raise SagaDefinitionError(f"{given!r:.100} is no step.", cure="pass functions, SagaStep(...) and the like.")
    return SagaStep(given)


def step_name(name: str, function: Any) -> str:
    """The given name, or that of the function with dashes.

    Raises:
        SagaDefinitionError: there is none, or it is no name of a step.
    """
    if not name:
        name = getattr(function, "__name__", "").strip("_").replace("_", "-").lower()
        if name in ("", "<lambda>"):
            raise SagaDefinitionError(f"{function!r:.100} has no name.", cure="pass name=... beside it.")
    return _check_name(name)


def _check_name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SagaDefinitionError(
            f"{name!r:.100} is no name of a step.",
            cure="use lower-case letters, digits, - and _, a letter first, at most 100.",
        )
    if name == INPUT:
        raise SagaDefinitionError(f"A step is called {INPUT!r}, as what the saga is started with.", cure="rename it.")
    return name


def _unknown(given: Any, name: str) -> Unknown:
    try:
        return Unknown(given)
    except ValueError as error:
        raise SagaDefinitionError(
            f"Step {name}: unknown={given!r:.80}.", cure=f"use one of {', '.join(Unknown)}."
        ) from error
