"""Starts the embedded database, makes the tables, places orders, and runs their sagas.

In a project the settings are your own, the tables come by ``migrate``, and the worker is a process of its own that
calls ``asyncio.run(soma.run())``.
"""

import asyncio
import logging
from typing import Any

import django
import psycopg
from django.conf import settings

from soma_common import Soma, SomaConfig
from soma_common.postgres.embedded import EmbeddedPostgres
from soma_common.sagas.settings import SagaSettings
from soma_common.sagas.sync import SagaOrchestrator


def connected(embedded: EmbeddedPostgres) -> None:
    """Django on the embedded database."""
    socket = psycopg.conninfo.conninfo_to_dict(embedded.start())["host"]
    database = {"ENGINE": "django.db.backends.postgresql", "NAME": "soma", "USER": "postgres", "HOST": socket}
    settings.configure(DATABASES={"default": database}, USE_TZ=True)
    django.setup()


def main() -> None:
    """The story."""
    from django.db import connection, transaction

    from examples.django_shop.models import Order, Stock
    from examples.django_shop.sagas import Placed, place_order

    soma = Soma.from_env(service_id="shop", sagas=[place_order], django="default")
    sagas = SagaOrchestrator()
    asyncio.run(upgraded(soma))
    with connection.schema_editor() as editor:
        editor.create_model(Order)
        editor.create_model(Stock)
    Stock.objects.create(item="lamp", pieces=1)
    Stock.objects.create(item="desk", pieces=5)

    def place(item: str) -> Order:
        """The row and its saga: both, or neither."""
        with transaction.atomic():
            order = Order.objects.create(item=item)
            sagas.start_saga(
                place_order, Placed(order.pk, item), connection, tenant_id="shop", saga_key=f"order-{order.pk}"
            )
            return order

    for item in ("lamp", "lamp", "desk"):
        place(item)
    try:
        with transaction.atomic():
            place("chair")
            raise ValueError("the browser went away")
    except ValueError as error:
        print("rolled back:", error)
    print("sagas begun:", started(connection))

    asyncio.run(ended(soma))
    for order in Order.objects.order_by("pk"):
        print(order.pk, order.item, order.state)
    print({stock.item: stock.pieces for stock in Stock.objects.order_by("item")})
    connection.close()


def started(connection: Any) -> int:
    """How many sagas there are, asked on Django's connection."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM soma.sagas")
        return int(cursor.fetchone()[0])


async def upgraded(soma: Soma) -> None:
    """Bring the library's own schema up to date, as `somastack db upgrade` does: in standalone, opening is enough."""
    async with soma:
        return


async def ended(soma: Soma) -> None:
    """Run a worker until every saga has ended."""
    async with soma, soma.saga_worker(settings=SagaSettings(at_once=1)):  # in their order: it is told who got the lamp
        for saga in (await soma.sagas.list(tenant_id="shop")).sagas[::-1]:
            try:
                print(saga.saga_key, await soma.sagas.result(saga.saga_id))
            except Exception as error:
                print(saga.saga_key, f"{error}".partition(" is ")[2])


if __name__ == "__main__":
    logging.disable(logging.ERROR)  # the story is told by what is printed
    database = EmbeddedPostgres(SomaConfig.from_env().folder)
    connected(database)
    try:
        main()
    finally:
        database.stop()
