"""Transactions with a bound: PostgreSQL ends them when their process stands still, or is gone without a word."""

from __future__ import annotations

from typing import Any, Final

from asyncpg.transaction import Transaction, TransactionState

from soma_common.postgres.bounds import Bound, milliseconds

_HAS_TRANSACTION_TIMEOUT: Final = 17  # version of PostgreSQL


class BoundedTransaction(Transaction):  # type: ignore[misc]
    """asyncpg's READ COMMITTED transaction, which says with its BEGIN how long it may be.

    A statement of its own for that would be one more round trip, for each step of each saga. The commit waits for the
    disk, whatever the session's default is.

    Args:
        connection: asyncpg's, or a pool's proxy of it.
    """

    def __init__(self, connection: Any, bound: Bound) -> None:
        super().__init__(getattr(connection, "_con", connection), "read_committed", False, False)
        self._bound = bound

    async def start(self) -> None:
        """Begin. Inside of another transaction it is a savepoint, which has that one's bound."""
        connection = self._connection
        if connection._top_xact is not None or connection.is_in_transaction():
            await super().start()
            return
        connection._top_xact = self  # as asyncpg does: savepoints look for it
        try:
            await connection.execute(begin_statement(self._bound, connection.get_server_version().major))
        except BaseException:
            self._state = TransactionState.FAILED
            raise
        self._state = TransactionState.STARTED


def begin_statement(bound: Bound, version: int) -> str:
    """BEGIN with a bound, for this version of PostgreSQL."""
    settings = {"synchronous_commit": "on", "idle_in_transaction_session_timeout": milliseconds(bound.silence)}
    if version >= _HAS_TRANSACTION_TIMEOUT:
        settings["transaction_timeout"] = milliseconds(bound.whole)
    return "; ".join(
        ["BEGIN ISOLATION LEVEL READ COMMITTED", *(f"SET LOCAL {name} = '{value}'" for name, value in settings.items())]
    )
