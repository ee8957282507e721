"""@trace_transaction on FastAPI's endpoints, asked through its test client."""

from __future__ import annotations

import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

import pytest
from fastapi import Depends, FastAPI, HTTPException, Query

from soma_common import Soma, SomaConfig, Tx, trace_transaction
from soma_common.testing.lane.sql_tools import SqlTools

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own dependency
    from fastapi.testclient import TestClient


def current_user(user: str = "ann") -> str:
    return user


def application(soma: Soma) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with soma:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/orders/{order}")
    @trace_transaction(name="place-order", tenant_id="acme", correlation_id=lambda order, **_: order)
    async def place(
        tx: Tx, order: str, user: Annotated[str, Depends(current_user)], count: Annotated[int, Query(ge=1)] = 1
    ) -> dict[str, Any]:
        await tx.conn.execute("INSERT INTO rows VALUES ($1)", order)
        if order == "refused":
            raise HTTPException(409, "out of stock")
        return {"order": order, "user": user, "count": count}

    @app.put("/orders/{order}")
    @trace_transaction(name="change-order", event_type="order.txn", tenant_id="acme")
    def change(order: str, tx: Tx, fail: bool = False) -> dict[str, str]:
        tx.conn.execute("UPDATE rows SET name = %s WHERE name = %s", (order.upper(), order))
        if fail:
            raise HTTPException(400, "no")
        return {"order": order.upper()}

    @app.get("/orders")
    @trace_transaction(name="list-orders", events=())
    async def orders(tx: Tx) -> list[str]:
        return [row[0] for row in await tx.conn.fetch("SELECT name FROM rows ORDER BY name")]

    return app


@pytest.fixture
def client(soma_database: str) -> Iterator[Any]:
    SqlTools.at(soma_database).query("CREATE TABLE rows (name text PRIMARY KEY)")
    soma = Soma(SomaConfig(postgres_dsn=soma_database, service_id="shop"))
    with TestClient(application(soma)) as client:
        yield client


def told(dsn: str) -> str:
    return SqlTools.at(dsn).query("SELECT string_agg(event_type, ' ' ORDER BY position) FROM soma.events")


def test_an_asynchronous_endpoint(client: Any, soma_database: str) -> None:
    answer = client.post("/orders/lamp?count=2&user=bob")
    assert (answer.status_code, answer.json()) == (200, {"order": "lamp", "user": "bob", "count": 2})
    assert client.post("/orders/desk?count=0").status_code == 422  # FastAPI still checks the parameters
    assert client.post("/orders/refused").status_code == 409
    assert client.get("/orders").json() == ["lamp"]
    assert told(soma_database) == "txn.started txn.committed txn.failed"
    ids = "SELECT string_agg(DISTINCT tenant_id || correlation_id, ' ') FROM soma.events"
    assert SqlTools.at(soma_database).query(ids) == "acmelamp acmerefused"


def test_an_endpoint_that_is_a_plain_function(client: Any, soma_database: str) -> None:
    client.post("/orders/lamp")
    assert client.put("/orders/lamp?fail=true").status_code == 400
    assert client.get("/orders").json() == ["lamp"]
    assert client.put("/orders/lamp").json() == {"order": "LAMP"}
    assert client.get("/orders").json() == ["LAMP"]
    assert told(soma_database).split()[2:] == ["order.txn.failed", "order.txn.started", "order.txn.committed"]


def test_the_transaction_is_no_part_of_the_interface(client: Any) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    named = [p["name"] for p in paths["/orders/{order}"]["post"]["parameters"]]
    assert sorted(named) == ["count", "order", "user"]
    assert "requestBody" not in paths["/orders/{order}"]["post"]
    assert [p["name"] for p in paths["/orders/{order}"]["put"]["parameters"]] == ["order", "fail"]
    assert "parameters" not in paths["/orders"]["get"]
