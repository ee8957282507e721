"""TransactionScope inside of Django; run by the test in a process of its own. Prints one line per scenario."""

from __future__ import annotations

import os
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import django

EXPECTED = 15
PASSED = [0]  # the position up to which events are of earlier scenarios


class Undone(Exception):
    """Raised to roll back."""


def main() -> None:
    """Every scenario in turn, on empty tables."""
    warnings.simplefilter("error")
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.integration.django_project.settings"
    django.setup()
    from django.db import connection

    from tests.integration.django_project.orders.models import Order

    with connection.schema_editor() as editor:
        editor.create_model(Order)
    scenarios: tuple[Callable[[], str], ...] = (
        autocommit, autocommit_rolled_back, inside_atomic, atomic_rolled_back, error_inside_atomic,
        joined_and_savepoint, swallowed, swallowed_error_of_the_database, atomic_inside, atomic_inside_rolled_back,
        scope_in_an_inner_atomic, marked_for_rollback, new, atomic_request, lost_and_closed,
    )  # fmt: skip
    for scenario in scenarios:
        expected = scenario()
        found = there()
        if found != expected:
            sys.exit(f"{scenario.__name__}: {found!r} is there, not {expected!r}")
        print(scenario.__name__, "ok")
        Order.objects.all().delete()
        with connection.cursor() as cursor:
            cursor.execute("SELECT max(position) FROM soma.events")
            PASSED[0] = cursor.fetchone()[0]
    connection.close()


def there() -> str:
    """The orders that are there, in the order of their events; exits when rows and events differ."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SELECT payload->>'number' FROM soma.events WHERE position > %s ORDER BY position", PASSED)
        events = [row[0] for row in cursor.fetchall()]
        cursor.execute("SELECT number::text FROM django_orders")
        orders = [row[0] for row in cursor.fetchall()]
    if sorted(orders) != sorted(events):
        sys.exit(f"orders {orders}, events {events}")
    return " ".join(events)


def scope(mode: Any = "join") -> Any:
    """A scope on Django's connection."""
    from django.db import connection

    from soma_common.sync import TransactionScope
    from tests.integration.django_project.services import store

    return TransactionScope(store, connection, mode=mode)


def write(tx: Any, number: int) -> None:
    """An order and its event."""
    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed

    Order.objects.create(number=number)
    tx.publish(placed(number))


def refused(error: type[Exception], run: Callable[[], object]) -> Exception:
    """The error that a function must raise."""
    try:
        run()
    except error as raised:
        return raised
    sys.exit(f"{run} raised no {error.__name__}")


def autocommit() -> str:
    with scope() as tx:
        write(tx, 1)
        write(tx, 2)
    return "1 2"


def autocommit_rolled_back() -> str:
    def run() -> None:
        with scope() as tx:
            write(tx, 1)
            raise Undone

    refused(Undone, run)
    return ""


def inside_atomic() -> str:
    from django.db import transaction

    with transaction.atomic():
        with scope() as tx:
            write(tx, 1)
        if there() != "1":  # recorded at the end of the scope, in the atomic block
            sys.exit("not recorded in the block")
        with scope() as tx:
            write(tx, 2)
    return "1 2"


def atomic_rolled_back() -> str:
    from django.db import transaction

    def run() -> None:
        with transaction.atomic():
            with scope() as tx:
                write(tx, 1)
            raise Undone

    refused(Undone, run)
    return ""


def error_inside_atomic() -> str:
    """A joined scope that fails lets the whole atomic block fail, as Django does it without a savepoint."""
    from django.db import transaction
    from django.db.transaction import TransactionManagementError

    def run() -> None:
        with transaction.atomic():
            try:
                with scope() as tx:
                    write(tx, 1)
                    raise Undone
            except Undone:
                pass
            with scope() as tx:
                write(tx, 2)

    refused(TransactionManagementError, run)
    with transaction.atomic():
        try:
            with scope("savepoint") as tx:
                write(tx, 1)
                raise Undone
        except Undone:
            pass
        with scope() as tx:
            write(tx, 2)
    return "2"


def joined_and_savepoint() -> str:
    with scope() as tx:
        write(tx, 1)
        with scope() as inner:
            write(inner, 2)
        try:
            with scope("savepoint") as inner:
                write(inner, 3)
                raise Undone
        except Undone:
            pass
        with scope("savepoint") as inner:
            write(inner, 4)
            write(tx, 5)
        write(tx, 6)
    return "1 2 4 5 6"


def swallowed() -> str:
    from soma_common.errors import TransactionDoomed

    def run() -> None:
        with scope() as tx:
            write(tx, 1)
            try:
                with scope() as inner:
                    write(inner, 2)
                    raise Undone
            except Undone:
                pass

    refused(TransactionDoomed, run)
    return ""


def swallowed_error_of_the_database() -> str:
    from django.db import IntegrityError

    from soma_common.errors import TransactionDoomed

    def run() -> None:
        with scope() as tx:
            write(tx, 1)
            with suppress(IntegrityError):
                write(tx, 1)

    refused(TransactionDoomed, run)
    return ""


def atomic_inside() -> str:
    from django.db import transaction

    with scope() as tx:
        write(tx, 1)
        with transaction.atomic():
            write(tx, 2)
        write(tx, 3)
    return "1 2 3"


def atomic_inside_rolled_back() -> str:
    """Django's own savepoint is undone: the events that were published in it are dropped, their order is kept."""
    from django.db import transaction

    with scope() as tx:
        write(tx, 1)
        try:
            with transaction.atomic():
                write(tx, 2)
                with transaction.atomic():
                    write(tx, 3)
                raise Undone
        except Undone:
            pass
        with transaction.atomic():
            write(tx, 4)
            try:
                with transaction.atomic(), scope() as inner:
                    write(inner, 5)
                    raise Undone
            except Undone:
                pass
        write(tx, 6)
    return "1 4 6"


def scope_in_an_inner_atomic() -> str:
    """A scope ended well, and the atomic block around it is undone later."""
    from django.db import transaction

    with scope() as tx:
        write(tx, 1)
        try:
            with transaction.atomic():
                with scope() as inner:
                    write(inner, 2)
                with scope("savepoint") as inner:
                    write(inner, 3)
                raise Undone
        except Undone:
            pass
    return "1"


def marked_for_rollback() -> str:
    from django.db import transaction

    from soma_common.errors import TransactionDoomed

    def run() -> None:
        with scope() as tx:
            write(tx, 1)
            transaction.set_rollback(True)

    refused(TransactionDoomed, run)
    return ""


def new() -> str:
    from django.db import transaction

    from soma_common.errors import TransactionError

    def run() -> None:
        with transaction.atomic(), scope("new"):
            pass

    refused(TransactionError, run)
    with scope("new") as tx:
        write(tx, 1)
    return "1"


def atomic_request() -> str:
    """ATOMIC_REQUESTS: the view runs in Django's block; an error of the view takes the events along."""
    from django.db import connection
    from django.test import Client

    connection.settings_dict["ATOMIC_REQUESTS"] = True
    try:
        client = Client(raise_request_exception=False)
        if client.post("/orders/1").status_code != 200:
            sys.exit("the view failed")
        if client.post("/orders/2?fail=1").status_code != 500:
            sys.exit("the view did not fail")
    finally:
        connection.settings_dict["ATOMIC_REQUESTS"] = False
    return "1"


def lost_and_closed() -> str:
    """In another thread, whose connection may be ruined."""
    from django.db import connection, connections

    from soma_common.errors import CommitUnknown, DatabaseUnavailable, TransactionElsewhere
    from tests.integration.django_project.orders.models import Order

    def closed() -> None:
        with scope():
            Order.objects.create(number=1)
            connection.connection.close()

    def killed(publish: bool) -> None:
        with scope() as tx:
            Order.objects.create(number=2)
            if publish:
                write(tx, 3)
            mine.cursor().execute("SELECT pg_terminate_backend(%s)", [connection.connection.info.backend_pid])

    def work() -> None:
        refused(DatabaseUnavailable, closed)
        connections.close_all()
        refused(DatabaseUnavailable, lambda: killed(True))
        connections.close_all()
        refused(CommitUnknown, lambda: killed(False))
        connections.close_all()
        refused(TransactionElsewhere, lambda: outer.conn)
        ended.append(True)

    mine: Any = connections["default"]
    mine.inc_thread_sharing()
    ended: list[bool] = []
    with scope() as outer:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    mine.dec_thread_sharing()
    if not ended:
        sys.exit("the thread failed")
    return ""


if __name__ == "__main__":
    main()
