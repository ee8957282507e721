"""The saga of an order. Its steps are plain functions on Django's connection: models take part in their commits."""

from dataclasses import dataclass

from django.db.models import F

from examples.django_shop.models import Order, Stock
from soma_common import Event, Saga, Tx, with_compensation
from soma_common.errors import StepRefused


@dataclass
class Placed:
    order_id: int
    item: str


def give_back(placed: Placed, tx: Tx) -> None:
    Stock.objects.filter(item=placed.item).update(pieces=F("pieces") + 1)
    tx.publish(Event(payload={}, event_type="stock.freed", tenant_id="shop", aggregate_id=placed.item))


@with_compensation(give_back)
def reserve(placed: Placed, tx: Tx) -> None:
    if not Stock.objects.filter(item=placed.item, pieces__gt=0).update(pieces=F("pieces") - 1):
        raise StepRefused("sold out")
    tx.publish(Event(payload={}, event_type="stock.reserved", tenant_id="shop", aggregate_id=placed.item))


def undeliver(placed: Placed, tx: Tx) -> None:
    Order.objects.filter(pk=placed.order_id).update(state="cancelled")


@with_compensation(undeliver)
def deliver(placed: Placed, tx: Tx) -> None:
    Order.objects.filter(pk=placed.order_id).update(state="delivered")


def collect(placed: Placed) -> str:
    if placed.item == "desk":
        raise StepRefused("the card was declined")
    return "paid"


place_order = Saga("place-order", Placed, reserve, deliver, collect)
