"""Decorators: a function as a transaction that tells about itself."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypedDict, TypeVar, Unpack, overload

from soma_common.blocking import BlockingTransactions
from soma_common.current import the_open_one
from soma_common.errors import CommitUnknown, ConfigurationError
from soma_common.events.store import EventStore
from soma_common.injection import TxParameter, hide
from soma_common.scopes import Mode, check_mode
from soma_common.traced import STANDARD, Given, Moment, Told, TracedCall
from soma_common.tracing.tracer import TransactionTracer
from soma_common.transactions import TransactionScope
from soma_common.tx import Tx

log = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S")

_EVERY: Final[tuple[Moment, ...]] = ("started", "committed", "failed")
_PATIENCE: Final = 2.0  # seconds for telling of a failure, which the caller waits for


class Application(Protocol):
    """Where transactions come from: a :class:`soma_common.Soma`."""

    @property
    def store(self) -> EventStore:
        """For ``async def``."""

    @property
    def blocking(self) -> BlockingTransactions:
        """For plain functions."""


class Traced(Protocol):
    """Takes a function, and gives it back without its ``tx: Tx``, where that is the first or the second parameter."""

    @overload
    def __call__(self, function: Callable[Concatenate[Tx, P], R], /) -> Callable[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[S, Tx, P], R], /) -> Callable[Concatenate[S, P], R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Callable[P, R]: ...


class TraceOptions(TypedDict, total=False):
    """The arguments of :func:`trace_transaction`."""

    name: str | None
    event_type: str
    events: Sequence[Moment]
    mode: Mode
    tenant_id: Given
    correlation_id: Given


def trace_transaction(*, app: Application | EventStore | None = None, **options: Unpack[TraceOptions]) -> Traced:
    """Run a function inside of a span and a ``TransactionScope``, and record how it went.

        @trace_transaction(name="place-order")
        async def place(order: Order, tx: Tx) -> None: ...

    For ``async def`` and for plain functions, methods and views included. A parameter annotated ``Tx`` is filled in,
    and hidden from callers and frameworks. ``txn.started`` and ``txn.committed`` are part of the transaction: when it
    is rolled back, neither is there. ``txn.failed`` is recorded after the rollback in a transaction of its own; where
    that is not possible the log says so, and the function's error is raised all the same. A cancelled call tells
    nothing.

    Args:
        name: what the function does, in the span and the events; its qualified name by default.
        event_type: the family of the events: "order.txn" makes them ``order.txn.started`` and so on, with the same
            payloads. It is also their aggregate type; the aggregate id is the ``txn_id``.
        events: which of them are recorded: "started", "committed", "failed".
        mode: what it is inside of an open scope: "join", "savepoint" or "new".
        tenant_id, correlation_id: of these events; a text, or a function of the call's arguments. By default those of
            the traced function around it, of the request or event at hand, else "default" and the ``txn_id``.
        app: the application, or an event store (``async def`` only); by default the one that is open in this process.

    Raises:
        ConfigurationError: it is no function, or an argument is none that can be; in a call: no application is open,
            or more than one.
    """
    event_type, moments = options.get("event_type", STANDARD), frozenset(options.get("events", _EVERY))
    mode = options.get("mode", "join")
    check_mode(mode)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        _check_function(function)
        told = Told(
            name=options.get("name") or str(getattr(function, "__qualname__", "")),
            family=event_type,
            moments=moments,
            tenant_id=options.get("tenant_id"),
            correlation_id=options.get("correlation_id"),
        )
        traced = _Traced(function, told, mode, app)
        wrapper = traced.awaited() if inspect.iscoroutinefunction(function) else traced.plain()
        hide(wrapper, function, traced.parameter)
        return wrapper

    return decorate


class _Traced:
    """A function with what is to be told of its calls."""

    def __init__(
        self, function: Callable[..., Any], told: Told, mode: Mode, app: Application | EventStore | None
    ) -> None:
        self._function, self._told, self._mode, self._app = function, told, mode, app
        self.parameter = TxParameter.of(function)
        self._tracer = TransactionTracer()

    def awaited(self) -> Callable[..., Any]:
        """The wrapper of an ``async def``."""

        @wraps(self._function)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            app = self._app or the_open_one()
            store = app if isinstance(app, EventStore) else app.store
            with self._call(args, kwargs) as call:
                try:
                    async with TransactionScope(store, mode=self._mode, trace=call.trace) as tx:
                        tx.publish(*call.started())
                        args, kwargs = self._filled(args, kwargs, tx)
                        result = await self._function(*args, **kwargs)
                        tx.publish(*call.committed())
                except Exception as error:
                    await _tell_failure(store, call, error)
                    raise
            return result

        return wrapper

    def plain(self) -> Callable[..., Any]:
        """The wrapper of a plain function."""

        @wraps(self._function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            app = self._app or the_open_one()
            if isinstance(app, EventStore):
                raise ConfigurationError(
                    f"{self._told.name} is a plain function, and app an asynchronous store.",
                    cure="pass the application: app=soma.",
                )
            with self._call(args, kwargs) as call:
                try:
                    with app.blocking.scope(mode=self._mode, trace=call.trace) as tx:
                        tx.publish(*call.started())
                        args, kwargs = self._filled(args, kwargs, tx)
                        result = _no_awaitable(self._function(*args, **kwargs), self._told.name)
                        tx.publish(*call.committed())
                except Exception as error:
                    _tell_failure_blocking(app.blocking, call, error)
                    raise
            return result

        return wrapper

    @contextmanager
    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[TracedCall]:
        with self._tracer.span(self._told.name) as trace, self._told.begin(args, kwargs, trace).inside() as call:
            yield call

    def _filled(self, args: tuple[Any, ...], kwargs: dict[str, Any], tx: Tx) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (args, kwargs) if self.parameter is None else self.parameter.filled(args, kwargs, tx)


async def _tell_failure(store: EventStore, call: TracedCall, error: Exception) -> None:
    """Record the failure. Of a COMMIT whose outcome is unknown nothing is told: it may have succeeded."""
    if isinstance(error, CommitUnknown):
        return
    try:
        async with asyncio.timeout(_PATIENCE):
            await store.publish(call.failed(error))
    except Exception as lost:
        _log_lost(call, lost)


def _tell_failure_blocking(blocking: BlockingTransactions, call: TracedCall, error: Exception) -> None:
    if isinstance(error, CommitUnknown):
        return
    try:
        for event in call.failed(error):
            blocking.record(event)
    except Exception as lost:
        _log_lost(call, lost)


def _log_lost(call: TracedCall, lost: Exception) -> None:
    log.warning("That %s failed (txn_id %s) was not recorded: %s", call.told.name, call.txn_id, lost or repr(lost))


def _check_function(function: Any) -> None:
    name = getattr(function, "__qualname__", repr(function))
    if not callable(function) or isinstance(function, type | staticmethod | classmethod):
        raise ConfigurationError(
            f"{name:.200} is no function.", cure="decorate a function, below @classmethod and @staticmethod."
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(
            f"{name} is a generator: its transaction would be open while others use its values.",
            cure="return a list, or open a scope inside of it.",
        )


def _no_awaitable(result: Any, name: str) -> Any:
    if not inspect.isawaitable(result):
        return result
    if inspect.iscoroutine(result):
        result.close()
    raise ConfigurationError(
        f"{name} is a plain function that returns an awaitable: it would run after the commit.",
        cure="make it `async def`.",
    )
