"""Transaction blocks on connections of synchronous callers: psycopg's, and Django's ``atomic``."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from soma_common.errors import DatabaseUnavailable, TransactionDoomed
from soma_common.postgres.sync import driver_connection, is_django


def block(connection: Any, *, savepoint: bool) -> AbstractContextManager[Any]:
    """A transaction that commits at its end; inside of an open one a part of it.

    ``savepoint``: it is rolled back alone when it fails. Without, Django's ``atomic`` around it fails as well; psycopg
    knows no such thing: there it is a savepoint, too.
    """
    if not is_django(connection):
        transaction: AbstractContextManager[Any] = connection.transaction()
        return transaction
    from soma_common.postgres.django_connections import atomic

    return atomic(connection, savepoint=savepoint)


def is_idle(connection: Any) -> bool:
    """Whether no transaction is open."""
    import psycopg

    idle = driver_connection(connection).info.transaction_status == psycopg.pq.TransactionStatus.IDLE
    return idle and not getattr(connection, "in_atomic_block", False)


def depth(connection: Any) -> int:
    """How many of the driver's blocks are open: what is in a deeper one may be undone alone."""
    if is_django(connection):
        return len(connection.atomic_blocks)
    return int(getattr(connection, "_num_transactions", 0))  # psycopg tells it nowhere else


def mark(connection: Any) -> object:
    """Something that Django forgets when the ``atomic`` block that is open now is rolled back."""
    from soma_common.postgres.django_connections import mark

    return mark(connection)


def marks(connection: Any) -> set[object]:
    """The marks that are not forgotten."""
    return {function for _, function, *_ in connection.run_on_commit}


def check_whole(connection: Any) -> None:
    """Whether what was done in a transaction can commit; told without asking the server.

    Raises:
        DatabaseUnavailable: the connection was lost or closed.
        TransactionDoomed: an error was swallowed, or the transaction was ended.
    """
    from psycopg.pq import TransactionStatus

    status = (
        connection.connection.info.transaction_status if is_django(connection) else connection.info.transaction_status
    )
    if status == TransactionStatus.UNKNOWN or getattr(connection, "closed_in_transaction", False):
        raise DatabaseUnavailable("The connection to PostgreSQL was lost or closed before COMMIT.")
    if status == TransactionStatus.INERROR or getattr(connection, "needs_rollback", False):
        raise TransactionDoomed(
            "An error was swallowed in this transaction: the database commits nothing of it.",
            cure="let the error pass, or run what may fail in a scope with mode='savepoint'.",
        )
    if status == TransactionStatus.IDLE:
        raise TransactionDoomed(
            "The block ended its transaction by itself.", cure="leave COMMIT and ROLLBACK to the scope."
        )
