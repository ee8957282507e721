"""Asks the traced views by Django's test clients; run by the test in a process of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import warnings
from typing import Any

import django

EXPECTED = 4


def main() -> None:
    """Every scenario in turn."""
    warnings.simplefilter("error")
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.integration.django_project.settings"
    django.setup()
    from django.db import connection
    from django.test.utils import override_settings

    from tests.integration.django_project.orders.models import Order

    with connection.schema_editor() as editor:
        editor.create_model(Order)
    with override_settings(ROOT_URLCONF="tests.integration.django_project.traced"):
        for scenario in (views, in_the_transaction_of_the_request, a_class, asynchronous_views):
            scenario()
            print(scenario.__name__, "ok")
    connection.close()


def told() -> tuple[str, int]:
    """The types of the events since it was last asked, and how many orders there are."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT event_type FROM soma.events ORDER BY position")
        types = [row[0] for row in cursor.fetchall()]
        cursor.execute("SELECT count(*) FROM django_orders")
        orders = cursor.fetchone()[0]
    new, SEEN[0] = types[SEEN[0] :], len(types)
    return " ".join(new), orders


SEEN = [0]
PLACED = "txn.started order.placed txn.committed"


def must(found: object, expected: object) -> None:
    """Exit with what was found where that is not what it must be."""
    if found != expected:
        sys.exit(f"{found!r} is not {expected!r}")


def client() -> Any:
    """Django's test client, which answers 500 where a view fails."""
    from django.test import Client

    return Client(raise_request_exception=False)


def views() -> None:
    must(client().post("/traced/1").status_code, 200)
    must(told(), (PLACED, 1))
    must(client().post("/traced/2?fail=1").status_code, 500)
    must(told(), ("txn.failed", 1))
    must(client().get("/traced/3").status_code, 405)
    must(told(), ("", 1))


def in_the_transaction_of_the_request() -> None:
    """The failure is recorded although the transaction of the request is rolled back."""
    from django.db import connection

    connection.settings_dict["ATOMIC_REQUESTS"] = True
    must(client().post("/traced/10").status_code, 200)
    must(told(), (PLACED, 2))
    must(client().post("/traced/11?fail=1").status_code, 500)
    must(told(), ("txn.failed", 2))
    connection.settings_dict["ATOMIC_REQUESTS"] = False


def a_class() -> None:
    must(client().post("/class/20").status_code, 200)
    must(told(), (PLACED, 3))


def asynchronous_views() -> None:
    from django.test import AsyncClient

    from tests.integration.django_project.traced import soma

    async def ask() -> None:
        async with soma:
            asking = AsyncClient(raise_request_exception=False)
            must((await asking.post("/note/30")).status_code, 200)
            must((await asking.post("/note/31?fail=1")).status_code, 500)
            must((await asking.post("/traced/32")).status_code, 200)  # a plain view, in a thread

    asyncio.run(ask())
    must(told(), (f"txn.started order.noted txn.committed txn.failed {PLACED}", 5))


if __name__ == "__main__":
    main()
