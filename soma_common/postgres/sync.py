"""Synchronous callers: psycopg 3 connections, and Django's."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from soma_common.postgres.arrays import literals
from soma_common.postgres.errors import translated
from soma_common.postgres.pool import Row


def fetch_sync(connection: Any, sql: str, args: Sequence[Any]) -> list[Row]:
    """All rows of one statement with ``$1`` parameters, in the connection's current transaction.

    ``connection`` is a psycopg connection or ``django.db.connection``.
    """
    import psycopg

    with translated(), _django_errors(connection):
        # Not closed: a cursor of the client's side holds nothing.
        cursor = psycopg.RawCursor(driver_connection(connection), row_factory=psycopg.rows.tuple_row)
        cursor.execute(sql, literals(args))
        found: list[Any] = cursor.fetchall() if cursor.description else []
        return found


def transaction_if_none(connection: Any) -> AbstractContextManager[Any]:
    """A transaction around what follows, when the connection is in autocommit and has none open."""
    import psycopg

    driver = driver_connection(connection)
    idle = driver.info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    return driver.transaction() if driver.autocommit and idle else nullcontext()


def is_django(connection: Any) -> bool:
    """Whether this is Django's connection, not psycopg's."""
    return hasattr(connection, "ensure_connection")


def driver_connection(connection: Any) -> Any:
    """psycopg's connection inside Django's; opened when Django has not opened it yet."""
    if is_django(connection):
        connection.ensure_connection()
        return connection.connection
    return connection


def _django_errors(connection: Any) -> AbstractContextManager[Any]:
    """Lets Django notice a failed statement, so that its ``atomic`` block rolls back."""
    wrap = getattr(connection, "wrap_database_errors", None)
    return wrap if wrap is not None else nullcontext()
