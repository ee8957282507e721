"""Views that place orders."""

from __future__ import annotations

from typing import Any

from django.db import connection
from django.http import HttpRequest, HttpResponse
from django.urls import path

from soma_common.sync import TransactionScope
from tests.integration.django_project.orders.models import Order
from tests.integration.django_project.services import placed, store


def place(request: HttpRequest, number: int) -> HttpResponse:
    """Place an order, in the transaction of the request where there is one."""
    with TransactionScope(store, connection) as tx:
        Order.objects.create(number=number)
        tx.publish(placed(number))
    if request.GET.get("fail"):
        raise ValueError("the view fails after its scope")
    return HttpResponse(b"placed")


urlpatterns: list[Any] = [path("orders/<int:number>", place)]
