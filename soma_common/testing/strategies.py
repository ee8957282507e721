"""Hypothesis strategies for payload models and the events around them: whatever a service may be sent.

    @given(payloads(OrderPlaced))
    def test_no_bill_is_negative(order): ...

Values keep to the model's constraints, and to what JSON, PostgreSQL and Kafka can hold: no NUL characters, no lone
surrogates, no NaN, no number beyond 64 bits.
"""

from __future__ import annotations

from typing import Any, Final

from hypothesis import strategies as st

from soma_common.events.models import Event, RecordedEvent
from soma_common.events.payloads import Payload
from soma_common.testing.factories import make_recorded
from soma_common.testing.type_values import Maker, Strategy
from soma_common.tracing.context import TraceContext

_NAMES: Final = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=20)
_TRACES: Final = st.builds(
    lambda trace, span: TraceContext(f"{trace:032x}", f"{span:016x}"),
    st.integers(1, 2**128 - 1),
    st.integers(1, 2**64 - 1),
)


def payloads(model: type[Payload], **fields: Any) -> st.SearchStrategy[Any]:
    """Payloads of a model.

    Args:
        fields: values, or strategies for them, of fields that are not to be just anything.

    Raises:
        ValueError: the model has no such field.
        TypeError: nothing is known of a field's type; pass a strategy for the field.
    """
    unknown = sorted(set(fields) - set(model.model_fields))
    if unknown:
        raise ValueError(f"{model.__name__} has no field {unknown[0]}; it has {', '.join(model.model_fields)}.")
    return Maker().model(model, {name: _values(value) for name, value in fields.items()})


def events(*models: type[Payload], **fields: Any) -> st.SearchStrategy[Event]:
    """Events as they are published, with payloads of these models.

    Args:
        fields: values, or strategies for them, of the event's other fields: ``tenant_id="acme"``.
    """
    made = dict.fromkeys(("tenant_id", "aggregate_type", "aggregate_id"), _NAMES)
    made |= {name: _values(value) for name, value in fields.items()}
    payload = st.one_of([payloads(model) for model in models])
    return st.builds(Event, payload=payload, **made)


def recorded_events(*models: type[Payload], version: Any = 1, **fields: Any) -> st.SearchStrategy[RecordedEvent]:
    """Events as handlers get them; each is the first of its stream, unless ``version`` says another."""
    fields.setdefault("trace", _TRACES)
    return st.builds(make_recorded, events(*models, **fields), version=_values(version))


def values(kind: Any) -> Strategy:
    """Values of any type that a payload model may have: ``values(Annotated[int, Field(ge=0)])``."""
    return Maker().of(kind)


def _values(value: Any) -> Strategy:
    return value if isinstance(value, st.SearchStrategy) else st.just(value)
