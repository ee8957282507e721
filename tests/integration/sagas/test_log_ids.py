"""Log lines of a step have the ids of its saga."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from soma_common.logging.formatters import SomaStackJSONFormatter
from soma_common.sagas.models import Saga, SagaContext, SagaStatus
from soma_common.tx import Tx
from tests.log_support import parsed
from tests.saga_support import opened

log = logging.getLogger("tests.saga_ids")


@dataclass
class Order:
    id: str


async def reserve(order: Order, tx: Tx, ctx: SagaContext) -> str:
    log.info("async", extra={"saga_id": ctx.saga_id})
    return order.id


def pay(order: Order, ctx: SagaContext) -> str:
    log.info("thread", extra={"saga_id": ctx.saga_id})
    return order.id


async def test_lines_of_steps(soma_database: str) -> None:
    found: list[dict[str, Any]] = []
    formatter = SomaStackJSONFormatter(service="shop")

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(parsed(formatter.format(record)))

    handler = Keep()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    buy = Saga("buy", Order, reserve, pay)
    try:
        async with opened(soma_database, buy) as sagas:
            view = await sagas.run(buy, Order("o-1"))
    finally:
        log.removeHandler(handler)
    assert view.status is SagaStatus.COMPLETED
    assert {line["message"] for line in found} == {"async", "thread"}
    for line in found:
        assert line["tenant_id"] == "shop"
        assert line["correlation_id"] == view.correlation_id
        assert line["data"] == {"saga_id": str(view.saga_id)}
