"""What the application's views would call."""

from __future__ import annotations

from django.db import connection, transaction

from soma_common.events.append import AppendSettings, Published
from soma_common.events.models import ANY, Event
from soma_common.sync import EventStore
from tests.integration.django_project.orders.models import Order

store = EventStore(AppendSettings("shop", route=lambda _: "shop.orders"))


def placed(number: int) -> Event:
    """The event of an order."""
    return Event(payload={"number": number}, tenant_id="t", aggregate_id=f"order-{number}", event_type="order.placed")


def place(number: int, *, expected: int = ANY) -> Published:
    """The order and its event, together or not at all."""
    with transaction.atomic():
        Order.objects.create(number=number)
        return store.publish(placed(number), connection, expected_version=expected)
