"""What cannot be handed to Temporal is refused when the worker is made."""

from __future__ import annotations

import pytest

from soma_common.errors import SagaDefinitionError
from soma_common.events.append import AppendSettings
from soma_common.events.models import Event
from soma_common.events.store import EventStore
from soma_common.postgres.pool import Pool
from soma_common.sagas.models import Ask, Saga, SubSaga
from soma_common.temporal.sagas import TemporalSagas


def command(number: int) -> Event:
    return Event(payload={}, event_type="a.b", tenant_id="t", aggregate_id="1")


def test_sagas_that_ask_other_services() -> None:
    store = EventStore(Pool("postgresql://h/d"), AppendSettings("tests"))
    asking = Saga("asks", int, Ask("stock", command))
    for saga in (asking, Saga("outer", int, SubSaga(asking))):
        with pytest.raises(SagaDefinitionError, match="asks other services by events"):
            TemporalSagas(store, [saga])
