"""A saga without a conductor: services react to each other's events, and each undoes its own part."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar
from uuid import UUID, uuid5

from pydantic import TypeAdapter

from soma_common.consumer.handlers import EVERY_TYPE, check_types
from soma_common.errors import SagaDefinitionError, SomaError, StepRefused
from soma_common.events.keys import check_name
from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.sagas.announcing import ANNOUNCED, compensating
from soma_common.sagas.parameters import INPUT, Call, Function, Kind, Known, Signature, adapter_of
from soma_common.sagas.steps import compensation_of, step_name

On = str | type[Payload]
Action = TypeVar("Action", bound=Callable[..., Any])

CONSUMER: Final = "choreography."
"""The names of the consumers of choreographies begin so."""
_NAME: Final = re.compile(r"[a-z][a-z0-9_-]{0,99}")
_IDS: Final = UUID("6f1c3a52-9a0e-5d55-8f0b-0d6c54a1b7e4")


@dataclass(frozen=True, slots=True)
class Reaction:
    """A step: what a service does when an event comes, and how that is undone.

    ``number`` counts from 1. ``refusals``: errors after which all is undone.
    """

    name: str
    number: int
    on: On
    call: Call
    undo: Call | None
    result: TypeAdapter[Any]
    refusals: tuple[type[Exception], ...]


class Choreography:
    """A service's part in a saga that has no conductor. Made once, at import, under the same name in every service.

        orders = Choreography("order", fails_on=[OrderRejected], ends_on=[OrderShipped])

        @orders.step(OrderPlaced, compensation=release)
        async def reserve(order: OrderPlaced, tx: Tx) -> Reserved: ...

        soma = Soma(config, choreographies=[orders])

    All events of one tenant with one correlation id belong together. A step runs once for them: in one transaction
    with what it publishes and its entry in the journal. When anything failed, every service undoes what it has done,
    the newest first, and runs no step any more.

    Args:
        name: the same in every service; lower-case letters, digits, - and _.
        fails_on: events after which all is undone, beside a step's ``StepRefused``. A failure is stronger than an end.
        ends_on: events after which it is completed.

    Raises:
        SagaDefinitionError: a name or a type that cannot be.
    """

    def __init__(self, name: str, *, fails_on: Iterable[On] = (), ends_on: Iterable[On] = ()) -> None:
        self.name = _name(name)
        self.fails_on, self.ends_on = self._types("fails_on", fails_on), self._types("ends_on", ends_on)
        both = self.fails_on & self.ends_on
        if both:
            raise SagaDefinitionError(f"{self} fails and ends on {min(both)}.", cure="decide for one.")
        self._reactions: dict[str, Reaction] = {}
        self._in_use = False

    def step(
        self, on: On, *, compensation: Function | None = None, name: str = "", fatal: Sequence[type[Exception]] = ()
    ) -> Callable[[Action], Action]:
        """Declare what this service does when an event comes. The function is returned as it is.

        Parameters are filled by their annotations: the event's payload (its model, or ``dict[str, Any]`` where the
        event is named by its type), ``RecordedEvent``, ``Tx``, ``SagaContext``.

        Args:
            on: the payload model of the event, or its type.
            compensation: undoes it; it may take the payload, what the step returned, ``Tx`` and ``SagaContext``. That
                of ``@with_compensation`` where it is left out.
            name: in the journal; the function's where it is left out.
            fatal: errors that refuse the step as ``StepRefused`` does. All others are tried again.

        Raises:
            SagaDefinitionError: the message names the step and the parameter.
        """

        def declare(action: Action) -> Action:
            if self._in_use:
                raise SagaDefinitionError(
                    f"{self} is in use: a step that is added now would never run.",
                    cure="declare its steps before Soma(choreographies=[...]).",
                )
            reaction = self._reaction(on, action, compensation or compensation_of(action), name, tuple(fatal))
            self._reactions[reaction.name] = reaction
            return action

        return declare

    def saga_id(self, tenant_id: str, correlation_id: str) -> UUID:
        """What ``get_saga`` knows the events of a correlation id by; the same in every service."""
        return uuid5(_IDS, f"{tenant_id}\0{self.name}\0{correlation_id}")

    def turn(self, tenant_id: str, correlation_id: str, *, reason: str) -> Event:
        """An event that lets all services undo what they have done, for people and programs. Publish it.

        Raises:
            ValidationError: a name that cannot be, or no reason.
        """
        saga_id = self.saga_id(tenant_id, correlation_id)
        why = check_name("reason", reason)
        return compensating(self.name, saga_id, tenant_id, why, correlation_id=correlation_id)

    @property
    def reactions(self) -> tuple[Reaction, ...]:
        """Its steps in this service, as they were declared."""
        return tuple(self._reactions.values())

    @property
    def consumer(self) -> str:
        """The name of the consumer that runs it."""
        return CONSUMER + self.name

    @property
    def type_id(self) -> int:
        """Stands for it in the database: 63 bits of a SHA-256 that no definition of a saga has."""
        return int.from_bytes(hashlib.sha256(f"choreography\0{self.name}".encode()).digest()[:8], "big") >> 1

    def taken(self) -> None:
        """From now on it has no other steps."""
        self._in_use = True

    def _reaction(
        self, on: On, action: Function, undo: Function | None, name: str, fatal: tuple[type[Exception], ...]
    ) -> Reaction:
        known = step_name(name, action)
        where = f"{self}, step {known}"
        if known in self._reactions:
            raise SagaDefinitionError(f"{where}: there are two of this name.", cure="pass another name=...")
        if not all(isinstance(kind, type) and issubclass(kind, Exception) for kind in fatal):
            raise SagaDefinitionError(f"{where}: fatal={fatal!r:.100}.", cure="name classes of errors.")
        event_type = self._type(where, on)
        if event_type in self.fails_on:
            raise SagaDefinitionError(
                f"{where} runs on {event_type}, on which all fails.", cure="undo in a compensation."
            )
        payload = Known(Kind.INPUT, INPUT, dict[str, Any] if isinstance(on, str) else on)
        signature = _signature(action, where)
        call = signature.bound((payload, Known(Kind.EVENT, "event", RecordedEvent)))
        returns = type(None) if signature.returns is None else signature.returns
        undoing = None
        if undo is not None:
            own = Known(Kind.OWN, known, returns)
            undoing = _signature(undo, f"{where}, its compensation").bound((payload, own))
        result = adapter_of(returns, f"{where}: the result")
        return Reaction(known, len(self._reactions) + 1, on, call, undoing, result, (StepRefused, *fatal))

    def _types(self, where: str, given: Iterable[On]) -> frozenset[str]:
        if isinstance(given, str | type):
            raise SagaDefinitionError(f"{self}: {where}={given!r:.80}.", cure="name event types in a list.")
        return frozenset(self._type(f"{self}, {where}", on) for on in given)

    def _type(self, where: str, on: On) -> str:
        try:
            check_types([on])
        except SomaError as error:
            raise SagaDefinitionError(f"{where}: {error.message}", cure="name an event type or its model.") from error
        found = on if isinstance(on, str) else on.event_type
        if found == EVERY_TYPE or found in ANNOUNCED:
            raise SagaDefinitionError(f"{where}: {found} is none of its events.", cure="name an event of a service.")
        return found

    def __str__(self) -> str:
        return f"Choreography {self.name}"

    def __repr__(self) -> str:
        return f"Choreography({self.name!r})"


def check_choreographies(given: Iterable[Choreography]) -> tuple[Choreography, ...]:
    """Choreographies, each name once; from now on they have no other steps.

    Raises:
        SagaDefinitionError: something is none, or there are two of one name.
    """
    known: dict[str, Choreography] = {}
    for each in given:
        if not isinstance(each, Choreography):
            raise SagaDefinitionError(f"{each!r:.100} is no Choreography.", cure="pass Choreography(name).")
        if known.setdefault(each.name, each) is not each:
            raise SagaDefinitionError(f"There are two choreographies {each.name}.", cure="declare all steps on one.")
        each.taken()
    return tuple(known.values())


def _name(name: Any) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SagaDefinitionError(
            f"{name!r:.100} is no name of a choreography.",
            cure="use lower-case letters, digits, - and _, a letter first, at most 100.",
        )
    return name


def _signature(function: Function, where: str) -> Signature:
    signature = Signature.of(function, where)
    if signature.blocking:
        raise SagaDefinitionError(
            f"{where} is a plain function: it would block the consumer, whose transaction it shares.",
            cure="declare it `async def`.",
        )
    return signature
