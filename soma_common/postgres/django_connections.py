"""Django's connection in a thread of a consumer: its handlers run inside of ``transaction.atomic()``."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import psycopg
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, reset_queries, transaction
from django.utils.connection import ConnectionDoesNotExist

from soma_common.errors import ConfigurationError, DatabaseUnavailable
from soma_common.postgres.thread_connections import KEEP_OPEN, ThreadConnection, refuse_end

log = logging.getLogger(__name__)


def check_alias(alias: str) -> None:
    """Whether Django is set up and has a PostgreSQL database of this name, by psycopg 3. Connects to nothing.

    Raises:
        ConfigurationError: it is not, or has not.
    """
    try:
        vendor = connections[alias].vendor
        from django.db.backends.postgresql.psycopg_any import is_psycopg3
    except ConnectionDoesNotExist as error:
        raise ConfigurationError(
            f"Django has no database {alias!r:.80}.", cure=f"name one of: {', '.join(connections.databases)}."
        ) from error
    except ImproperlyConfigured as error:
        raise ConfigurationError(
            f"Django is not set up: {error}", cure="set DJANGO_SETTINGS_MODULE and call django.setup() before."
        ) from error
    if vendor != "postgresql" or not is_psycopg3:
        raise ConfigurationError(
            f"Django's database {alias!r} is {vendor}{'' if is_psycopg3 else ' by psycopg2'}.",
            cure="name the one of the event log: PostgreSQL by psycopg 3.",
        )


class DjangoLender:
    """Django's connection of the caller's thread; beside it, where that is in a transaction, one of its own."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    @contextmanager
    def lend(self) -> Iterator[Any]:
        """The connection that Django keeps for this thread."""
        yield connections[self._alias]

    @contextmanager
    def lend_idle(self) -> Iterator[Any]:
        """The same where it is in no transaction; else another one, made for this."""
        wrapper = connections[self._alias]
        if not wrapper.in_atomic_block and wrapper.get_autocommit():
            yield wrapper
            return
        other = connections.create_connection(self._alias)
        try:
            yield other
        finally:
            other.close()

    def close(self) -> None:
        """Django closes its connections itself."""


def atomic(connection: Any, *, savepoint: bool) -> AbstractContextManager[object]:
    """Django's ``atomic`` block on one of its connections."""
    block: AbstractContextManager[object] = transaction.atomic(using=connection.alias, savepoint=savepoint)
    return block


def mark(connection: Any) -> object:
    """A function that does nothing after the commit: Django forgets it when the block that is open is rolled back."""

    def nothing() -> None: ...

    transaction.on_commit(nothing, using=connection.alias)
    return nothing


class DjangoConnection(ThreadConnection):
    """The connection that Django keeps for this thread under an alias."""

    def __init__(self, alias: str) -> None:
        super().__init__()
        self._alias = alias
        self._atomic: AbstractContextManager[object] | None = None
        self._guard: AbstractContextManager[None] | None = None
        self._committed = False

    @property
    def _wrapper(self) -> Any:
        return connections[self._alias]

    def _connected(self) -> psycopg.Connection[Any]:
        reset_queries()
        wrapper = self._wrapper
        for other in connections.all(initialized_only=True):
            # A consumer has no requests after which to close: of its own connection an age of 0 means "keep it".
            if other is not wrapper or wrapper.settings_dict["CONN_MAX_AGE"]:
                other.close_if_unusable_or_obsolete()
        wrapper.ensure_connection()
        raw: psycopg.Connection[Any] = wrapper.connection
        return raw

    def _enter(self, raw: psycopg.Connection[Any]) -> Any:
        wrapper = self._wrapper
        if raw.isolation_level != psycopg.IsolationLevel.READ_COMMITTED:  # whatever Django's OPTIONS say
            raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        self._committed = False
        self._atomic = transaction.atomic(using=self._alias, durable=True)
        self._atomic.__enter__()
        self._guard = wrapper.execute_wrapper(_refuse_end)
        self._guard.__enter__()
        transaction.on_commit(self._has_committed, using=self._alias)
        return wrapper

    def _has_committed(self) -> None:
        self._committed = True

    def commit(self) -> None:
        try:
            self._leave(None)
        except Exception:
            if not self._committed:
                raise
            # Nothing undoes the commit any more; what is to be certain is published as an event.
            log.exception("A handler's on_commit function failed after the commit.")
        if not self._committed:  # Django says nothing when it rolls back instead, or finds the connection closed
            lost = self.is_lost()
            self.close()
            if lost:
                raise DatabaseUnavailable("The connection to PostgreSQL was lost before COMMIT.")
            raise ConfigurationError("Django did not commit the transaction of a batch.", cure=KEEP_OPEN)

    def _undo(self) -> None:
        self._leave(_Undone())

    def _leave(self, why: Exception | None) -> None:
        atomic, self._atomic = self._atomic, None
        guard, self._guard = self._guard, None
        if guard is not None:
            guard.__exit__(None, None, None)
        if atomic is not None:
            atomic.__exit__(type(why) if why else None, why, None)

    def check(self) -> None:
        super().check()
        if len(self._wrapper.atomic_blocks) != 1:
            raise ConfigurationError("A handler entered an atomic block and did not leave it.", cure=KEEP_OPEN)

    def _must_undo(self) -> bool:
        return bool(self._wrapper.needs_rollback)

    def _shut(self) -> None:
        """Also a wrapper that is caught in a block: Django makes a new one."""
        wrapper = self._wrapper
        self._atomic = self._guard = None
        if wrapper.in_atomic_block:
            if wrapper.connection is not None:
                wrapper.connection.close()
            del connections[self._alias]
        connections.close_all()


class _Undone(Exception):
    """Leaves an atomic block without committing it."""


def _refuse_end(execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
    refuse_end(sql)
    return execute(sql, params, many, context)
