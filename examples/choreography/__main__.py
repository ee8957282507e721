"""One order that goes through, and one whose payment is refused: a saga of three services, without a conductor.

    python -m examples.choreography

Starts what it needs: a PostgreSQL with a database for each service, a Kafka, and a process for each service.
"""

from __future__ import annotations

import asyncio
import importlib
import os
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from uuid import UUID

from examples.choreography.events import SERVICES, TENANT, OrderPlaced
from examples.choreography.servers import processes, servers
from soma_common import Event, EventFilter, SagaStatus, Soma
from soma_common.errors import SagaNotFound
from soma_common.sagas.views import SagaView

PATIENCE = 90.0  # seconds
ORDERS = (
    OrderPlaced(order_id="A-1", customer="Ada", pieces=1, cents=42_00),
    OrderPlaced(order_id="A-2", customer="Bob", pieces=3, cents=900_00),
)
# What each of them comes to, as every service shall see it.
EXPECTED = {
    "A-1": (SagaStatus.COMPLETED, {
        "done orders/accept", "done stock/reserve", "done payment/charge", "done orders/confirm",
    }),
    "A-2": (SagaStatus.COMPENSATED, {
        "done orders/accept", "done stock/reserve", "failed payment/charge",
        "undone orders/accept", "undone stock/reserve",
    }),
}  # fmt: skip
TABLES = {
    "orders": "SELECT string_agg(order_id || ' ' || state, ', ' ORDER BY order_id) FROM orders",
    "stock": "SELECT free || ' pieces free' FROM stock",
    "payment": "SELECT string_agg(order_id || ' ' || cents || ' cents', ', ') FROM charge",
}


async def example() -> None:
    """Publish both orders in one service, and look at them from all three."""
    async with AsyncExitStack() as stack:
        services = {service: await stack.enter_async_context(_application(service)) for service in SERVICES}
        for placed in ORDERS:
            await services["orders"].publish(
                Event(payload=placed, tenant_id=TENANT, aggregate_id=placed.order_id, correlation_id=placed.order_id)
            )
        for placed in ORDERS:
            views = [await _ended(soma, service, placed.order_id) for service, soma in services.items()]
            _show(views)
            traces = {trace for soma in services.values() for trace in await _traces(soma, placed.order_id)}
            print(f"  traces of its events: {len(traces)}")
        for service, soma in services.items():
            print(f"{service + ':':9}{(await soma.pool.fetch(TABLES[service]))[0][0]}")


def _application(service: str) -> Soma:
    soma: Soma = importlib.import_module(f"examples.choreography.{service}").soma
    return soma


async def _ended(soma: Soma, service: str, order_id: str) -> SagaView:
    """The journal of an order in a service's database, once it tells all that is expected."""
    order = importlib.import_module(f"examples.choreography.{service}").order
    saga_id: UUID = order.saga_id(TENANT, order_id)
    status, wanted = EXPECTED[order_id]
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        try:
            view = await soma.sagas.get_saga(saga_id)
        except SagaNotFound:
            view = None
        if view is not None and view.status is status and _told(view) == wanted:
            return view
        await asyncio.sleep(0.05)
    raise TimeoutError(f"Order {order_id} is not {status} in {service} after {PATIENCE:g} s: {view}")


def _told(view: SagaView) -> set[str]:
    """What became of each step."""
    return {f"{each.what} {each.step}" for each in view.journal if each.what in ("done", "failed", "undone")}


def _show(views: list[SagaView]) -> None:
    """One journal; all services have the same."""
    view = views[-1]
    print(f"order {view.correlation_id}: {view.status}, as {len(views)} services see it")
    steps: dict[str, list[str]] = {}
    for line in map(str.split, sorted(_told(view))):
        steps.setdefault(line[1], []).append(line[0])
    for step, what in sorted(steps.items()):
        print(f"  {step:16}{', '.join(what)}")
    if view.error:
        print(f"  because of {view.reason}: {view.error}")


async def _traces(soma: Soma, order_id: str) -> set[str]:
    events = await soma.store.query(EventFilter(tenant_id=TENANT, correlation_id=order_id))
    return {event.trace_id for event in events}


def main(env: Mapping[str, str] = os.environ) -> None:
    """Start everything, show it, end everything."""
    with servers() as settings:
        os.environ.update(settings)  # the applications of this process are made of them, too
        with processes({**env, **settings}):
            asyncio.run(example())


if __name__ == "__main__":
    main()
