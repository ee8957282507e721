"""Views that are traced transactions, synchronous and asynchronous."""

from __future__ import annotations

import os
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.urls import path
from django.views import View
from django.views.decorators.http import require_POST

from soma_common import Event, Soma, SomaConfig, Tx
from tests.integration.django_project.orders.models import Order
from tests.integration.django_project.services import placed

soma = Soma(SomaConfig(postgres_dsn=os.environ["DJANGO_DATABASE"], service_id="shop"), django="default")


@require_POST
@soma.trace_transaction(name="place-order", tenant_id="t", correlation_id=lambda _, number: f"c-{number}")
def place(request: HttpRequest, tx: Tx, number: int) -> HttpResponse:
    """Place an order by the ORM."""
    Order.objects.create(number=number)
    tx.publish(placed(number))
    if request.GET.get("fail"):
        raise ValueError("the view fails")
    return HttpResponse(b"placed")


class Places(View):
    """The same as a class."""

    @soma.trace_transaction(name="place-order", tenant_id="t")
    def post(self, request: HttpRequest, tx: Tx, number: int) -> HttpResponse:
        """Place an order by the ORM."""
        Order.objects.create(number=number)
        tx.publish(placed(number))
        return HttpResponse(b"placed")


@soma.trace_transaction(name="note", tenant_id="t")
async def note(request: HttpRequest, tx: Tx, number: int) -> HttpResponse:
    """An asynchronous view writes through asyncpg, and does not use the ORM."""
    await tx.conn.execute("INSERT INTO django_orders (number) VALUES ($1)", number)
    tx.publish(Event(payload={"number": number}, event_type="order.noted", tenant_id="t", aggregate_id=str(number)))
    if request.GET.get("fail"):
        raise ValueError("the view fails")
    return HttpResponse(b"noted")


urlpatterns: list[Any] = [
    path("traced/<int:number>", place),
    path("class/<int:number>", Places.as_view()),
    path("note/<int:number>", note),
]
