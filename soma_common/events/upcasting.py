"""Upcasters: payloads of old schema versions brought to the newest one when they are read. The log stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from soma_common.errors import ConfigurationError, PayloadInvalid
from soma_common.events.models import RecordedEvent
from soma_common.events.payloads import PayloadModels, check_payload
from soma_common.events.types import check_event_type

Upcast = Callable[[dict[str, Any]], dict[str, Any]]
"""From the payload of one version, as JSON has it, to that of the next. It gets its own copy at the top level."""


class Upcasters(Mapping[tuple[str, int], Upcast]):
    """Upcasts by (event type, version they start from); each leads to the next version, so no chain can be a circle.

        Upcasters({("order.placed", 1): add_currency, ("order.placed", 2): split_name})

    Raises:
        ConfigurationError: a version below 1, a step missing between two versions, or a chain that ends before or
            behind the newest model (checked when ``models`` are given).
    """

    def __init__(self, steps: Mapping[tuple[str, int], Upcast] = {}, *, models: PayloadModels | None = None) -> None:
        self._steps = dict(steps)
        self._newest: dict[str, int] = {}
        for (event_type, version), step in sorted(self._steps.items(), key=lambda item: item[0]):
            self._take(check_event_type(event_type), version, step)
        for event_type, newest in self._newest.items():
            _check_end(event_type, newest, models)

    def __getitem__(self, key: tuple[str, int]) -> Upcast:
        return self._steps[key]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def newest(self, event_type: str) -> int | None:
        """The version that the chain of this type ends at, or None when it has no upcasters."""
        return self._newest.get(event_type)

    def upcast(self, event: RecordedEvent) -> RecordedEvent:
        """The event with its payload in the newest version; the same object when there is nothing to do.

        Raises:
            PayloadInvalid: an upcaster raised, or returned something else than an object.
        """
        version, payload = event.schema_version, event.payload
        step = self._steps.get((event.event_type, version))
        if step is None:
            return event
        while step is not None:
            payload = _apply(step, event, version, payload)
            version += 1
            step = self._steps.get((event.event_type, version))
        return event.with_payload(payload, version)

    def _take(self, event_type: str, version: int, step: Upcast) -> None:
        if version < 1 or not callable(step):
            raise ConfigurationError(f"The upcaster of {event_type} v{version} is no function from a version >= 1.")
        before = self._newest.get(event_type, version)
        if before != version:
            missing = ", ".join(f"v{gap}" for gap in range(before, version))
            cure = "add the missing upcasters: each leads from one version to the next."
            raise ConfigurationError(f"{event_type} has no upcaster from {missing}.", cure=cure)
        self._newest[event_type] = version + 1


def typed(event: RecordedEvent, models: PayloadModels, upcasters: Upcasters) -> RecordedEvent:
    """The event upcast, and its payload as the model of that version; a dict where no model is registered.

    Raises:
        PayloadInvalid: an upcaster failed, or the payload does not match its model.
    """
    newest = upcasters.upcast(event)
    model = models.get((newest.event_type, newest.schema_version))
    payload = check_payload(newest.payload, model)
    return newest if payload is newest.payload else newest.with_payload(payload, newest.schema_version)


def _apply(step: Upcast, event: RecordedEvent, version: int, payload: Any) -> dict[str, Any]:
    where = f"The upcaster of {event.event_type} v{version}"
    plain = payload.model_dump(mode="json") if hasattr(payload, "model_dump") else dict(payload)
    try:
        changed = step(plain)
    except Exception as error:  # the application's function: whatever it raises becomes one named error
        raise PayloadInvalid(f"{where} failed on event {event.event_id}: {type(error).__name__}: {error}.") from error
    if not isinstance(changed, dict):
        raise PayloadInvalid(f"{where} returned a {type(changed).__name__}.", cure="return the new payload as a dict.")
    return changed


def _check_end(event_type: str, newest: int, models: PayloadModels | None) -> None:
    latest = models.latest(event_type) if models is not None else None
    if latest is not None and latest != newest:
        raise ConfigurationError(
            f"The upcasters of {event_type} end at v{newest}, and its newest model is v{latest}.",
            cure=f"lead them to v{latest}.",
        )
