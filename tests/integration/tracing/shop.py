"""A shop of several processes, each with a role: ``python -m tests.integration.tracing.shop web|consumer|replay``.

The web application records an order; the consumer begins a saga for it, whose payment is refused; the replay does the
order once more. They are told by the environment where database, Kafka and collector are.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from soma_common import (
    Event,
    RecordedEvent,
    Saga,
    Soma,
    SomaConfig,
    Tx,
    configure_tracing,
    current_tenant,
    trace_transaction,
    with_compensation,
)  # fmt: skip
from soma_common.consumer.handlers import HandlerContext
from soma_common.errors import StepRefused
from soma_common.middleware.asgi import RequestContextMiddleware
from soma_common.replay.models import ReplayFilter, ReplayMode


async def unreserve(order: str, tx: Tx) -> None:
    tx.publish(_event("stock.released", order))


@with_compensation(unreserve)
async def reserve(order: str, tx: Tx) -> None:
    tx.publish(_event("stock.reserved", order))


async def pay(order: str) -> None:
    raise StepRefused("the card was declined")


BOOK = Saga("book", str, reserve, pay)


def _event(event_type: str, order: str) -> Event:
    return Event(payload={}, event_type=event_type, aggregate_type="order", aggregate_id=order)


def application(*, sagas: bool) -> Soma:
    soma = Soma(SomaConfig.from_env(), sagas=[BOOK] if sagas else ())

    @soma.handler("order.placed", consumer="orders")
    async def placed(event: RecordedEvent, ctx: HandlerContext) -> None:
        assert current_tenant() == event.tenant_id
        order = event.aggregate_id
        await soma.sagas.start_saga(BOOK, order, tenant_id=event.tenant_id, saga_key=order, tx=ctx.tx)

    return soma


def web(soma: Soma) -> Any:
    """``POST /orders/{order}``."""

    @trace_transaction(name="place-order", app=soma, events=())
    async def place(order: str, tx: Tx) -> None:
        tx.publish(_event("order.placed", order))

    async def orders(request: Request) -> JSONResponse:
        await place(request.path_params["order"])
        return JSONResponse({"placed": True}, 202)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        async with soma:
            yield

    app = Starlette(routes=[Route("/orders/{order}", orders, methods=["POST"])], lifespan=lifespan)
    return RequestContextMiddleware(app, require_tenant=True, baggage=["plan"])


def serve(soma: Soma) -> None:
    """Print the port, serve until SIGTERM."""
    import uvicorn

    config = uvicorn.Config(web(soma), host="127.0.0.1", port=0, log_level="warning", lifespan="on")
    server = uvicorn.Server(config)

    async def main() -> None:
        serving = asyncio.create_task(server.serve())
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        if server.started:
            print(server.servers[0].sockets[0].getsockname()[1], flush=True)
        await serving

    asyncio.run(main())


async def replay(soma: Soma) -> None:
    """Apply every order again."""
    async with soma, soma.replays("orders") as engine:
        wanted = ReplayFilter(tenant_id="acme", event_type="order.placed")
        recorded = await engine.start(wanted, ReplayMode.FORCE, requested_by="tests", reason="to see it")
        *_, done = [run async for run in engine.run(recorded.run_id)]
        print(done.counts.applied, flush=True)


def main(role: str) -> None:
    """Play one role."""
    tracing = configure_tracing(service=role, endpoint=os.environ["COLLECTOR"], every=0.1)
    soma = application(sagas=role == "consumer")
    if role == "web":
        serve(soma)
    elif role == "consumer":
        asyncio.run(soma.run())
    else:
        asyncio.run(replay(soma))
    tracing.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
