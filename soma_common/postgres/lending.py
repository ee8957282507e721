"""Connections for plain functions that bring none: psycopg's, used again and again, or Django's own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from soma_common.errors import MissingDependency
from soma_common.postgres.errors import translated
from soma_common.postgres.pool import PoolSettings


class Lender(Protocol):
    """Lends connections to whoever asks, from any thread."""

    def lend(self) -> AbstractContextManager[Any]:
        """A connection for a transaction of the caller's thread."""

    def lend_idle(self) -> AbstractContextManager[Any]:
        """A connection in autocommit that has no transaction open, whatever the caller's thread is in."""

    def close(self) -> None:
        """Close what nobody uses now; the rest when it comes back."""


def lender_of(settings: Callable[[], PoolSettings], django: str | None) -> Lender:
    """Lends Django's connections under an alias, or else psycopg's with a pool's settings.

    Raises:
        MissingDependency: the driver is not installed.
        ConfigurationError: Django is not set up, or has no such database on PostgreSQL.
    """
    try:
        if django is None:
            return PsycopgLender(settings())
        from soma_common.postgres.django_connections import DjangoLender, check_alias
    except ImportError as error:
        raise MissingDependency(
            "Transactions of plain functions need psycopg, which is not installed.",
            cure="pip install 'soma-common[psycopg]', or make the function `async def`.",
        ) from error
    check_alias(django)
    return DjangoLender(django)


class PsycopgLender:
    """psycopg connections in autocommit. One that comes back rests until it is wanted again.

    Raises:
        ConfigurationError: the address cannot be read.
    """

    def __init__(self, settings: PoolSettings) -> None:
        from soma_common.postgres.thread_connections import conninfo_of

        self._conninfo, self._most = conninfo_of(settings), settings.size
        self._threshold = None if settings.transaction_pooler else 5
        self._resting: deque[Any] = deque()
        self._closed = False

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """A connection that nobody else has."""
        connection = self._take()
        try:
            yield connection
        finally:
            self._take_back(connection)

    lend_idle = lend

    def close(self) -> None:
        """Close those that rest."""
        self._closed = True
        while self._resting:
            self._resting.pop().close()

    def _take(self) -> Any:
        import psycopg

        from soma_common.postgres.thread_connections import is_sound

        while self._resting:
            try:
                connection = self._resting.pop()
            except IndexError:  # another thread was quicker
                break
            if is_sound(connection):
                return connection
            connection.close()
        with translated():
            return psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=self._threshold)

    def _take_back(self, connection: Any) -> None:
        from soma_common.postgres.thread_connections import is_sound

        if is_sound(connection) and connection.autocommit and len(self._resting) < self._most:
            self._resting.append(connection)
            if not self._closed:
                return
            self._resting.remove(connection)
        connection.close()
