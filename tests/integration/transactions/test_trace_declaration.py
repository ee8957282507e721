"""@trace_transaction where it is declared: signatures, methods, the application that is meant, what is refused."""

from __future__ import annotations

import gc
import inspect
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

from soma_common import EventStore, Soma, SomaConfig, Tx, current, trace_transaction
from soma_common.errors import ConfigurationError, ValidationError
from soma_common.events.models import RecordedEvent
from soma_common.testing.lane.sql_tools import SqlTools
from tests.core_support import settings
from tests.waiting import until

if TYPE_CHECKING:
    from decimal import Decimal


@pytest.fixture
async def soma(soma_database: str) -> AsyncIterator[Soma]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    async with Soma(SomaConfig(postgres_dsn=soma_database, service_id="shop")) as soma:
        yield soma


async def told(soma: Soma) -> list[str]:
    """The types of the recorded events, in their order."""
    return [event.event_type for event in await soma.store.query(tenant_id="default")]


async def events(soma: Soma, **wanted: Any) -> list[RecordedEvent]:
    return list(await soma.store.query(**({"tenant_id": "default"} | wanted)))


async def rows(soma: Soma) -> int:
    return int((await soma.pool.fetch("SELECT count(*) FROM rows"))[0][0])


INSERT = "INSERT INTO rows VALUES ('a')"


async def test_methods_keep_their_self(soma: Soma) -> None:
    class Shop:
        name = "shop"

        @trace_transaction()
        async def method(self, tx: Tx, order: str) -> str:
            """Of a method."""
            await tx.conn.execute(INSERT)
            return f"{self.name} {order}"

        @classmethod
        @trace_transaction()
        async def of_class(cls, order: str, *, tx: Tx) -> str:
            return f"{cls.name} {order} {len(tx.pending)}"

        @staticmethod
        @trace_transaction()
        def static(order: str, tx: Tx, /, more: int = 1) -> str:
            return f"{order} {more} {len(tx.pending)}"

    assert await Shop().method("a") == "shop a"
    assert await Shop.of_class("b") == "shop b 1"
    assert Shop.static("c", more=2) == "c 2 1"
    assert Shop.method.__doc__ == "Of a method."
    names = [e.payload["name"].rpartition(".")[2] for e in await events(soma)]
    assert names == ["method", "method", "of_class", "of_class", "static", "static"]


async def test_the_transaction_is_hidden_and_the_rest_is_kept(soma: Soma) -> None:
    @trace_transaction(name="n")
    async def work(price: Decimal, tx: Tx, count: int = 1) -> None: ...

    assert str(inspect.signature(work)) == "(price: 'Decimal', count: 'int' = 1) -> 'None'"
    assert inspect.iscoroutinefunction(work)
    assert "tx" not in work.__annotations__
    assert work.__name__ == "work"
    await work(1, 2)  # type: ignore[call-arg, arg-type]
    with pytest.raises(TypeError, match="leave it out"):
        await work(1, tx=None)  # type: ignore[call-arg, arg-type]
    await inspect.unwrap(work)(1, None)


async def test_without_a_parameter_nothing_is_passed(soma: Soma) -> None:
    @trace_transaction(name="n")
    async def work(*args: int, **kwargs: int) -> tuple[Any, Any]:
        return args, kwargs

    assert await work(1, tx=2) == ((1,), {"tx": 2})


async def test_which_application_is_meant(soma: Soma, soma_database16: str) -> None:
    @trace_transaction(name="n")
    async def work() -> None: ...

    await work()
    async with Soma(SomaConfig(postgres_dsn=soma_database16)) as other:
        with pytest.raises(ConfigurationError, match="2 applications are open"):
            await work()
        await trace_transaction(app=other, name="other")(inspect.unwrap(work))()
        await other.trace_transaction(name="other")(inspect.unwrap(work))()
        await trace_transaction(app=other.store, name="other")(inspect.unwrap(work))()
        assert await told(other) == ["txn.started", "txn.committed"] * 3
    await work()
    assert await told(soma) == ["txn.started", "txn.committed"] * 2


async def test_no_application_is_open() -> None:
    gc.collect()

    @trace_transaction(name="n")
    async def work() -> None: ...

    @trace_transaction(name="n")
    def plain() -> None: ...

    with pytest.raises(ConfigurationError, match="No application is open") as refused:
        await work()
    assert "@soma.trace_transaction" in (refused.value.cure or "")
    with pytest.raises(ConfigurationError, match="No application is open"):
        plain()
    with pytest.raises(ConfigurationError, match="No application is open"):
        current.the_open_one()


async def test_a_store_will_do_for_async_functions_only(soma: Soma) -> None:
    @trace_transaction(app=EventStore(soma.pool, settings()), name="n")
    def plain() -> None: ...

    with pytest.raises(ConfigurationError, match="plain function, and app an asynchronous store"):
        plain()


async def test_a_plain_function_that_returns_an_awaitable_is_refused(soma: Soma) -> None:
    async def later() -> None: ...

    @trace_transaction(name="n")
    def plain() -> Any:
        return later()

    with pytest.raises(ConfigurationError, match="after the commit"):
        plain()
    assert await told(soma) == ["txn.failed"]


def _two(a: Tx, b: Tx) -> None: ...


def _generator() -> Any:
    yield 1


async def _async_generator() -> Any:
    yield 1


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (_two, {}, "two transactions"),
        (_generator, {}, "is a generator"),
        (_async_generator, {}, "is a generator"),
        (staticmethod(_two), {}, "below @classmethod"),
        (Soma, {}, "is no function"),
        (None, {}, "is no function"),
        (until, {"mode": "nested"}, "no mode"),
        (until, {"events": ("begun",)}, "events names 'begun'"),
        (until, {"event_type": "Order Txn"}, "is not an event type"),
    ],
)
def test_what_cannot_be_is_refused_where_it_is_declared(function: Any, options: Any, words: str) -> None:
    with pytest.raises((ConfigurationError, ValidationError), match=words):
        trace_transaction(**options)(function)
