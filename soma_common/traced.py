"""What a traced transaction tells about itself, as events of one family: started, committed, failed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from soma_common.ambient import LOGGED, current_correlation_id, current_tenant
from soma_common.dlq.failures import Failure, Stage
from soma_common.errors import ConfigurationError
from soma_common.events.ids import uuid7
from soma_common.events.keys import check_name
from soma_common.events.models import Event
from soma_common.events.payloads import Payload
from soma_common.events.standard import TxnCommitted, TxnFailed, TxnStarted
from soma_common.events.types import check_event_type
from soma_common.tracing.context import TraceContext

Moment = Literal["started", "committed", "failed"]
Given = str | Callable[..., str] | None

STANDARD: Final = "txn"
NO_TENANT: Final = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What is told about the calls of a function; see :func:`soma_common.decorators.trace_transaction`.

    Raises:
        ConfigurationError, ValidationError: there is no such moment; the family cannot begin event types.
    """

    name: str
    family: str = STANDARD
    moments: frozenset[Moment] = frozenset(get_args(Moment))
    tenant_id: Given = None
    correlation_id: Given = None

    def __post_init__(self) -> None:
        unknown = self.moments - set(get_args(Moment))
        if unknown:
            raise ConfigurationError(
                f"events names {', '.join(map(repr, sorted(map(str, unknown))))}.",
                cure=f"use some of {', '.join(get_args(Moment))}.",
            )
        check_event_type(f"{self.family}.committed")
        if not self.name:
            raise ConfigurationError("A traced transaction has no name.", cure="@trace_transaction(name=...).")

    def begin(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: TraceContext | None) -> TracedCall:
        """A call of the function with these arguments, under a trace; without one it is the enclosing call's.

        Raises:
            ValidationError: the tenant or the correlation is none that an event can have.
        """
        outer = _CURRENT.get()
        txn_id = str(uuid7())
        tenant = _given("tenant_id", self.tenant_id, args, kwargs)
        tenant = tenant or (outer.tenant_id if outer else current_tenant() or NO_TENANT)
        correlation = _given("correlation_id", self.correlation_id, args, kwargs)
        correlation = correlation or (outer.correlation_id if outer else current_correlation_id() or txn_id)
        trace = trace or (outer.trace if outer else TraceContext.new())
        return TracedCall(told=self, txn_id=txn_id, tenant_id=tenant, correlation_id=correlation, trace=trace)


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedCall:
    """One call of a traced function, and its events; each is empty where it is not wanted."""

    told: Told
    txn_id: str
    tenant_id: str
    correlation_id: str
    trace: TraceContext
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def inside(self) -> Iterator[TracedCall]:
        """Makes it the one that encloses the calls in this block."""
        before, logged = _CURRENT.get(), LOGGED.get()
        _CURRENT.set(self)
        LOGGED.set(self)
        try:
            yield self
        finally:
            _CURRENT.set(before)
            LOGGED.set(logged)

    def started(self) -> tuple[Event, ...]:
        """It began."""
        return self._event("started", TxnStarted(txn_id=self.txn_id, name=self.told.name))

    def committed(self) -> tuple[Event, ...]:
        """It reached its end; recorded in its own transaction."""
        payload = TxnCommitted(txn_id=self.txn_id, name=self.told.name, duration_ms=self._duration())
        return self._event("committed", payload)

    def failed(self, error: BaseException) -> tuple[Event, ...]:
        """It was rolled back."""
        failure = Failure.of(Stage.HANDLE, error)
        payload = TxnFailed(
            txn_id=self.txn_id,
            name=self.told.name,
            error_type=failure.error_type,
            error=failure.message,
            duration_ms=self._duration(),
        )
        return self._event("failed", payload)

    def _event(self, moment: Moment, payload: Payload) -> tuple[Event, ...]:
        told = self.told
        if moment not in told.moments:
            return ()
        standard = told.family == STANDARD
        event = Event(
            payload=payload if standard else payload.model_dump(mode="json"),
            event_type="" if standard else f"{told.family}.{moment}",
            tenant_id=self.tenant_id,
            aggregate_type=told.family,
            aggregate_id=self.txn_id,
            correlation_id=self.correlation_id,
            trace=self.trace,
        )
        return (event,)

    def _duration(self) -> float:
        return round((time.perf_counter() - self.began) * 1000, 3)


_CURRENT: ContextVar[TracedCall | None] = ContextVar("soma_traced_call", default=None)


def _given(what: str, value: Given, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """The text that was given, None where nothing was. What is wrong with it is told before the function runs."""
    return None if value is None else check_name(what, value(*args, **kwargs) if callable(value) else value)
