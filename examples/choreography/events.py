"""The events of an order, as all three services know them."""

from __future__ import annotations

from soma_common import Payload, PayloadModels

SERVICES = ("orders", "stock", "payment")
TOPICS = [f"soma.{service}.events" for service in SERVICES]
TENANT = "acme"


class OrderPlaced(Payload, event_type="order.placed"):
    order_id: str
    customer: str
    pieces: int
    cents: int


class StockReserved(Payload, event_type="stock.reserved"):
    order_id: str
    customer: str
    cents: int


class PaymentCharged(Payload, event_type="payment.charged"):
    order_id: str


class OrderConfirmed(Payload, event_type="order.confirmed"):
    order_id: str


MODELS = PayloadModels(OrderPlaced, StockReserved, PaymentCharged, OrderConfirmed)
