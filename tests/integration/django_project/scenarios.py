"""Run by the test in a process of its own: Django's settings belong to a process. Prints one line per scenario."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable

import django


class Undone(Exception):
    """Raised to roll back."""


def main() -> None:
    """Every scenario in turn; each leaves the tables as it found them empty."""
    warnings.simplefilter("error")
    os.environ["DJANGO_SETTINGS_MODULE"] = "tests.integration.django_project.settings"
    django.setup()
    from django.db import connection

    from tests.integration.django_project.orders.models import Order

    with connection.schema_editor() as editor:
        editor.create_model(Order)
    for scenario in (
        committed, rolled_back, savepoint_rolled_back, conflict_inside_atomic, failed_statement, autocommit,
        autocommit_with_a_slow_clock, broken_connection, lost_in_atomic,
    ):  # fmt: skip
        scenario()
        print(scenario.__name__, "ok")
    connection.close()


def counts() -> tuple[int, int, int]:
    """Orders, events, outbox rows; and empties nothing."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT (SELECT count(*) FROM django_orders), (SELECT count(*) FROM soma.events), "
            "(SELECT count(*) FROM soma.outbox)"
        )
        row = cursor.fetchone()
    return int(row[0]), int(row[1]), int(row[2])


def grown(by: int, run: Callable[[], object]) -> None:
    """Every table grows by so many rows, or by none."""
    before = counts()
    run()
    after = counts()
    grew = tuple(now - then for now, then in zip(after, before, strict=True))
    if grew != (by, by, by):
        sys.exit(f"{run}: grew by {grew}, not by {by}")


def committed() -> None:
    from tests.integration.django_project.services import place

    grown(1, lambda: place(1, expected=0))


def rolled_back() -> None:
    from django.db import transaction

    from tests.integration.django_project.services import place

    def run() -> None:
        try:
            with transaction.atomic():
                place(2)
                raise Undone
        except Undone:
            pass

    grown(0, run)


def savepoint_rolled_back() -> None:
    from django.db import transaction

    from tests.integration.django_project.services import place

    def run() -> None:
        with transaction.atomic():
            place(3)
            try:
                with transaction.atomic():
                    place(4)
                    raise Undone
            except Undone:
                pass

    grown(1, run)


def conflict_inside_atomic() -> None:
    """WrongExpectedVersion is an answer, not a failed statement: the block goes on."""
    from django.db import connection, transaction

    from soma_common.errors import WrongExpectedVersion
    from tests.integration.django_project.services import place, placed, store

    def run() -> None:
        with transaction.atomic():
            try:
                store.publish(placed(1), connection, expected_version=7)
            except WrongExpectedVersion as refused:
                if refused.actual != 1:
                    raise
            place(5)

    grown(1, run)


def failed_statement() -> None:
    """A statement that PostgreSQL refuses is the library's error, and Django rolls the block back."""
    from django.db import connection, transaction

    from soma_common.errors import ClusterChanged
    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed, store

    def run() -> None:
        try:
            with transaction.atomic():
                Order.objects.create(number=6)
                with connection.cursor() as cursor:
                    cursor.execute("UPDATE soma.cluster SET system_identifier = 5")
                    cursor.execute("SET LOCAL soma.cluster_checked = ''")
                store.publish(placed(6), connection)
                sys.exit("not refused")
        except ClusterChanged:
            pass

    grown(0, run)


def autocommit() -> None:
    from django.db import connection

    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed, store

    def run() -> None:
        Order.objects.create(number=7)
        store.publish(placed(7), connection, expected_version=0)

    grown(1, run)


def autocommit_with_a_slow_clock() -> None:
    """Refused once for its stamp, the publish goes on in a transaction, which it commits."""
    from dataclasses import replace
    from datetime import UTC, datetime, timedelta

    from django.db import connection

    from soma_common.sync import EventStore
    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed, store

    slow = EventStore(replace(store.settings, clock=lambda: datetime.now(UTC) - timedelta(seconds=50)))

    def run() -> None:
        Order.objects.create(number=8)
        slow.publish(placed(7), connection, expected_version=1)
        if connection.connection.info.transaction_status.name != "IDLE":
            sys.exit("a transaction was left open")

    grown(1, run)


def broken_connection() -> None:
    """A connection that is gone is DatabaseUnavailable; ``again`` settles what became of the publish."""
    from django.db import connection

    from soma_common.errors import DatabaseUnavailable
    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed, store

    def run() -> None:
        Order.objects.create(number=9)
        given = placed(9)
        store.publish(given, connection)
        connection.connection.close()
        try:
            store.publish(given, connection)
            sys.exit("not noticed")
        except DatabaseUnavailable:
            connection.close()
        if store.publish(given, connection, again=True)[0].version != 1:
            sys.exit("recorded again")

    grown(1, run)


def lost_in_atomic() -> None:
    """An order that its own table refuses takes its event along; that error stays Django's."""
    from django.db import IntegrityError, connection, transaction

    from tests.integration.django_project.orders.models import Order
    from tests.integration.django_project.services import placed, store

    def run() -> None:
        try:
            with transaction.atomic():
                store.publish(placed(10), connection)
                Order.objects.create(number=1)
        except IntegrityError:
            pass

    grown(0, run)


if __name__ == "__main__":
    main()
