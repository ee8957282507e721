"""soma-common: events that are never lost, reordered or applied twice, across PostgreSQL and Kafka.

This is the door: import public names from here. Each is loaded when it is first used, so that importing the package
costs little and needs no driver.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing.TYPE_CHECKING, without loading typing
if TYPE_CHECKING:
    from typing import Any

    from soma_common.ambient import current_correlation_id as current_correlation_id
    from soma_common.ambient import current_tenant as current_tenant
    from soma_common.app import Soma as Soma
    from soma_common.config import SomaConfig as SomaConfig
    from soma_common.decorators import trace_transaction as trace_transaction
    from soma_common.deployment import DeployMode as DeployMode
    from soma_common.errors import SomaError as SomaError
    from soma_common.events.keys import StreamKey as StreamKey
    from soma_common.events.models import ANY as ANY
    from soma_common.events.models import EXISTS as EXISTS
    from soma_common.events.models import NO_STREAM as NO_STREAM
    from soma_common.events.models import Event as Event
    from soma_common.events.models import RecordedEvent as RecordedEvent
    from soma_common.events.payloads import Payload as Payload
    from soma_common.events.payloads import PayloadModels as PayloadModels
    from soma_common.events.store import ALL_TENANTS as ALL_TENANTS
    from soma_common.events.store import EventFilter as EventFilter
    from soma_common.events.store import EventStore as EventStore
    from soma_common.events.types import EventType as EventType
    from soma_common.logging.config import configure_logging as configure_logging
    from soma_common.sagas.choreography import Choreography as Choreography
    from soma_common.sagas.models import Saga as Saga
    from soma_common.sagas.models import SagaStatus as SagaStatus
    from soma_common.sagas.models import SagaStep as SagaStep
    from soma_common.sagas.models import with_compensation as with_compensation
    from soma_common.sagas.orchestrator import SagaOrchestrator as SagaOrchestrator
    from soma_common.tracing.context import TraceContext as TraceContext
    from soma_common.tracing.setup import configure_tracing as configure_tracing
    from soma_common.tracing.tracer import TransactionTracer as TransactionTracer
    from soma_common.transactions import TransactionScope as TransactionScope
    from soma_common.tx import Tx as Tx

_HOME = {
    "ALL_TENANTS": "events.store",
    "ANY": "events.models",
    "Choreography": "sagas.choreography",
    "DeployMode": "deployment",
    "EXISTS": "events.models",
    "Event": "events.models",
    "EventFilter": "events.store",
    "EventStore": "events.store",
    "EventType": "events.types",
    "NO_STREAM": "events.models",
    "Payload": "events.payloads",
    "PayloadModels": "events.payloads",
    "RecordedEvent": "events.models",
    "Saga": "sagas.models",
    "SagaOrchestrator": "sagas.orchestrator",
    "SagaStatus": "sagas.models",
    "SagaStep": "sagas.models",
    "Soma": "app",
    "SomaConfig": "config",
    "SomaError": "errors",
    "StreamKey": "events.keys",
    "TraceContext": "tracing.context",
    "TransactionScope": "transactions",
    "TransactionTracer": "tracing.tracer",
    "Tx": "tx",
    "configure_logging": "logging.config",
    "configure_tracing": "tracing.setup",
    "current_correlation_id": "ambient",
    "current_tenant": "ambient",
    "trace_transaction": "decorators",
    "with_compensation": "sagas.models",
}

__all__ = sorted(_HOME)  # computed, so that door and homes cannot disagree
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'soma_common' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"soma_common.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
