"""What an application recorded while a test ran, read from its log: no matter which process recorded it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Self

from soma_common.errors import ConfigurationError
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.events.upcasting import typed
from soma_common.filtering import ALL_TENANTS, AllTenants
from soma_common.postgres.cursor import Cursor
from soma_common.testing.waiting import WITHIN, eventually

if TYPE_CHECKING:
    from soma_common.app import Soma

Kind = str | type[Payload]
_SHOWN: Final = 20  # events of a failure's text


class EventRecorder:
    """The events that were recorded since it began, in the order of the log.

        async with application as soma, EventRecorder(soma) as recorded:
            await place_order(soma, "o-1")
            placed = await recorded.one(OrderPlaced, order="o-1")
            await recorded.wait_for(OrderBilled, order="o-1")
            await recorded.none(OrderRefused)

    It reads the database, so it sees what other tasks, threads and processes committed, and nothing that was rolled
    back. Payloads come as the application's models; those of types without one, as dicts.

    Args:
        soma: the application; open.
        tenant_id: whose events count; by default all tenants'.
    """

    def __init__(self, soma: Soma, *, tenant_id: str | AllTenants = ALL_TENANTS) -> None:
        self._soma, self._tenant = soma, tenant_id
        self._cursor: Cursor | None = None
        self._seen: list[RecordedEvent] = []

    async def __aenter__(self) -> Self:
        now = await self._soma.store.ticks.latest()
        self._cursor, self._seen = Cursor(now.tick_id, now.token), []
        return self

    async def __aexit__(self, *exc: object) -> None:
        """What was seen stays."""

    async def events(self, kind: Kind | None = None, **fields: Any) -> list[RecordedEvent]:
        """Those of a type (its name or its model), with these values in their payloads; all, when nothing is given.

        ``fields`` are compared by ``==``; a function is asked instead: ``cents=lambda cents: cents > 0``.

        Raises:
            ConfigurationError: it was not entered.
        """
        await self._catch_up()
        return [event for event in self._seen if _is(event, kind, fields)]

    async def types(self) -> list[str]:
        """The types of all events, in order."""
        return [event.event_type for event in await self.events()]

    async def one(self, kind: Kind, **fields: Any) -> RecordedEvent:
        """The only such event.

        Raises:
            AssertionError: there is none, or more than one; lists what was recorded.
        """
        found = await self.events(kind, **fields)
        if len(found) != 1:
            raise AssertionError(f"{len(found)} events are {_told(kind, fields)}, not 1. {self._listed()}")
        return found[0]

    async def none(self, kind: Kind, **fields: Any) -> None:
        """There is no such event so far.

        Raises:
            AssertionError: there is; lists what was recorded.
        """
        found = await self.events(kind, **fields)
        if found:
            raise AssertionError(f"{len(found)} events are {_told(kind, fields)}. {self._listed()}")

    async def wait_for(
        self, kind: Kind, *, count: int = 1, within: float = WITHIN, **fields: Any
    ) -> list[RecordedEvent]:
        """Such events, as soon as there are ``count`` of them or more; waits at most ``within`` seconds.

        Raises:
            AssertionError: there were fewer in time; lists what was recorded.
        """

        async def enough() -> list[RecordedEvent]:
            found = await self.events(kind, **fields)
            if len(found) < count:
                raise AssertionError(f"{len(found)} events are {_told(kind, fields)}, not {count}. {self._listed()}")
            return found

        return await eventually(enough, within=within, what=f"recording {count} of {_name(kind)}")

    async def _catch_up(self) -> None:
        if self._cursor is None:
            raise ConfigurationError(
                "The recorder has not begun.", cure="use `async with EventRecorder(soma) as recorded:`."
            )
        soma = self._soma
        async for events, cursor in soma.store.so_far(after=self._cursor):
            wanted = [event for event in events if self._tenant in (ALL_TENANTS, event.tenant_id)]
            self._seen += [typed(event, soma.models, soma.upcasters) for event in wanted]
            self._cursor = cursor

    def _listed(self) -> str:
        if not self._seen:
            return "Nothing was recorded."
        counted = Counter(event.event_type for event in self._seen)
        types = ", ".join(f"{count} {name}" for name, count in counted.most_common(_SHOWN))
        last = "\n".join(f"  {event.event_type} {event.stream}: {_payload(event)}" for event in self._seen[-_SHOWN:])
        return f"Recorded: {types}\n{last}"


def _name(kind: Kind) -> str:
    return kind if isinstance(kind, str) else kind.event_type


def _is(event: RecordedEvent, kind: Kind | None, fields: dict[str, Any]) -> bool:
    if kind is not None and event.event_type != _name(kind):
        return False
    return all(_fits(event.payload, name, wanted) for name, wanted in fields.items())


_ABSENT: Final = object()


def _fits(payload: Any, name: str, wanted: Any | Callable[[Any], object]) -> bool:
    value = payload.get(name, _ABSENT) if isinstance(payload, dict) else getattr(payload, name, _ABSENT)
    if value is _ABSENT:
        return False
    return bool(wanted(value)) if callable(wanted) else bool(value == wanted)


def _told(kind: Kind, fields: dict[str, Any]) -> str:
    values = ", ".join(f"{name}={value!r:.100}" for name, value in fields.items())
    return f"{_name(kind)} with {values}" if values else _name(kind)


def _payload(event: RecordedEvent) -> str:
    return f"{event.payload!r:.300}"
