"""A connection that belongs to one thread, and its transactions: psycopg's own, or Django's."""

from __future__ import annotations

import logging
import os
import re
import select
import socket
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import psycopg
from psycopg import capabilities
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import ConnStatus, PollingStatus, TransactionStatus

from soma_common.errors import ConfigurationError, DatabaseUnavailable
from soma_common.postgres.pool import PoolSettings, notice_silence
from soma_common.postgres.sync import fetch_sync
from soma_common.sql.loader import blocks

log = logging.getLogger(__name__)

KEEP_OPEN: Final = (
    "leave COMMIT and ROLLBACK to the consumer; a savepoint is `with ctx.tx.transaction()`, in Django `atomic()`."
)
_SAFE: Final = capabilities.has_cancel_safe()
_CANCELLING: Final = 5.0  # seconds that asking the server to cancel a statement may take
_ENDS: Final = re.compile(
    r"(?:\s|--[^\n]*\n|/\*.*?\*/)*(commit|end|abort|begin|start\s+transaction|prepare\s+transaction"
    r"|rollback(?!\s+(work\s+|transaction\s+)?to\b))\b",
    re.IGNORECASE | re.DOTALL,
)


class Grip:
    """What another thread may do to a connection in use: cancel its statement, or cut it off.

    Made by the connection's own thread: a second descriptor of its socket, and libpq's object for cancelling. Neither
    touches what that thread works with, and both stay good when it closes the connection meanwhile.
    """

    def __init__(self, raw: psycopg.Connection[Any]) -> None:
        # libpq 17: encrypted as the connection is, and nobody else waits for it.
        self._canceller: Any = raw.pgconn.cancel_conn() if _SAFE else raw.pgconn.get_cancel()
        self._cancelling = threading.Lock()
        self._socket = socket.socket(fileno=os.dup(raw.fileno()))
        try:
            notice_silence(self._socket)
        except OSError:  # the connection was lost this very moment
            self._socket.close()
            raise

    def cancel(self) -> None:
        """Ask the server to end the statement that runs now, in a thread that ends soon."""
        threading.Thread(target=self._cancel, name="soma cancel", daemon=True).start()

    def _cancel(self) -> None:
        with self._cancelling, suppress(psycopg.Error, OSError):
            if _SAFE:
                _cancel_patiently(self._canceller)
            else:
                self._canceller.cancel()

    def cut(self) -> None:
        """Whoever waits for the server hears at once that the connection is lost."""
        with suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


def _cancel_patiently(canceller: Any) -> None:
    try:
        canceller.start()
        while (state := canceller.poll()) in (PollingStatus.READING, PollingStatus.WRITING):
            poll = select.poll()
            poll.register(canceller.socket, select.POLLIN if state == PollingStatus.READING else select.POLLOUT)
            if not poll.poll(_CANCELLING * 1000):
                return
    finally:
        canceller.reset()


class ThreadConnection(ABC):
    """One thread's connection; all but ``cancel`` and ``cut`` is called by that thread.

    ``place`` is the row that the block ``place`` of ``consumer.sql`` gives in the right database; None: not compared.
    ``raw`` is psycopg's connection.
    """

    def __init__(self) -> None:
        self.place: Sequence[Any] | None = None
        self.raw: psycopg.Connection[Any] | None = None
        self._grip: Grip | None = None

    def begin(self) -> Any:
        """Begin a READ COMMITTED transaction, on a new connection where the old one is not sound; what handlers get.

        Raises:
            DatabaseUnavailable, ConfigurationError: there is no connection, or one to another database.
        """
        if self.raw is not None and not is_sound(self.raw):
            self.close()
        try:
            raw = self._connected()
            if raw is not self.raw:
                self._take(raw)
            return self._enter(raw)
        except BaseException:
            self.close()  # whatever was half begun must not meet the next transaction
            raise

    def _take(self, raw: psycopg.Connection[Any]) -> None:
        if self._grip is not None:
            self._grip.close()
        self.raw, self._grip = raw, Grip(raw)
        if self.place is not None and tuple(fetch_sync(raw, blocks("consumer")["place"], ())[0]) != tuple(self.place):
            raise ConfigurationError(
                "Handlers that are plain functions would work in another database than the event log's.",
                cure="name the database of the log: its DSN and that of Django's alias must lead to the same one.",
            )

    @abstractmethod
    def _connected(self) -> psycopg.Connection[Any]:
        """The driver's connection, made if there is none."""

    @abstractmethod
    def _enter(self, raw: psycopg.Connection[Any]) -> Any:
        """Begin; what handlers get."""

    @abstractmethod
    def commit(self) -> None:
        """Commit what was begun. Every error says that it was not committed, or (connection lost) that nobody knows."""

    @abstractmethod
    def _undo(self) -> None:
        """Roll back what was begun."""

    @abstractmethod
    def _shut(self) -> None:
        """Close the connection, whatever state it is in."""

    def rollback(self) -> None:
        """Roll back what was begun; where that fails, the connection is closed. Raises nothing."""
        try:
            self._undo()
            if self.raw is None or self.raw.closed or self.raw.info.transaction_status != TransactionStatus.IDLE:
                self.close()
        except Exception as error:
            log.debug("A rollback failed, and the connection is closed: %s", error)
            self.close()

    def close(self) -> None:
        """Close the connection; the next ``begin`` makes another one. Safe to call twice."""
        try:
            self._shut()
        except Exception as error:
            log.debug("A connection was not closed in good order: %s", error)
        grip, self._grip, self.raw = self._grip, None, None
        if grip is not None:
            grip.close()

    def check(self) -> None:
        """Whether what was begun can still commit, after a handler.

        Raises:
            DatabaseUnavailable: the connection was lost.
            ConfigurationError: the handler closed it, ended the transaction, or went on after an error of the database.
        """
        raw = self.raw
        if self.is_lost() or raw is None:
            raise DatabaseUnavailable("The connection to PostgreSQL was lost in a handler.")
        if raw.closed:
            raise ConfigurationError("A handler closed the connection of its batch.", cure=KEEP_OPEN)
        status = raw.info.transaction_status
        if status == TransactionStatus.INERROR or self._must_undo():
            raise ConfigurationError(
                "A handler went on after an error of the database: its transaction cannot commit any more.",
                cure="let the error pass, or catch it outside of a savepoint: `with ctx.tx.transaction()`, in Django "
                "`with atomic()`.",
            )
        if status != TransactionStatus.INTRANS:
            log.error("A handler ended its transaction: what it committed of a replay is not undone.")
            raise ConfigurationError("A handler ended the transaction of its batch.", cure=KEEP_OPEN)

    def _must_undo(self) -> bool:
        return False

    def is_lost(self) -> bool:
        """Whether the connection was lost, not closed by its user."""
        return self.raw is None or self.raw.broken

    def cancel(self) -> None:
        """From any thread: end the statement that runs now."""
        if self._grip is not None:
            self._grip.cancel()

    def cut(self) -> None:
        """From any thread: the connection is lost, for this side and for the server."""
        grip = self._grip
        if grip is not None:
            grip.cut()
            grip.cancel()  # a server that works on a statement does not look at its socket


def is_sound(raw: psycopg.Connection[Any]) -> bool:
    """Whether an idle connection is alive. What can be read from it is mostly the server's last word."""
    if raw.closed or raw.info.transaction_status != TransactionStatus.IDLE:
        return False
    poll = select.poll()
    poll.register(raw.fileno(), select.POLLIN)
    return raw.pgconn.status == ConnStatus.OK and not poll.poll(0)


class _Cursor(psycopg.Cursor[Any]):
    """A cursor that refuses to end the batch's transaction."""

    def execute(self, query: Any, *args: Any, **given: Any) -> Any:
        refuse_end(query)
        return super().execute(query, *args, **given)


def refuse_end(query: Any) -> None:
    """Refuse a statement that would begin or end a transaction, before anything is lost by it.

    Raises:
        ConfigurationError: it would.
    """
    text = query.decode(errors="replace") if isinstance(query, bytes) else query
    if isinstance(text, str) and _ENDS.match(text):
        raise ConfigurationError(f"A handler asked for {text.strip():.40}.", cure=KEEP_OPEN)


class PsycopgConnection(ThreadConnection):
    """psycopg's own connection, to the database of a pool.

    It is in autocommit inside of a ``Transaction``: psycopg refuses ``commit()`` and ``rollback()`` there, and never
    begins a transaction by itself.
    """

    def __init__(self, settings: PoolSettings) -> None:
        super().__init__()
        self._conninfo = conninfo_of(settings)
        self._threshold = None if settings.transaction_pooler else 5
        self._transaction: psycopg.Transaction | None = None

    def _connected(self) -> psycopg.Connection[Any]:
        if self.raw is not None:
            return self.raw
        raw = psycopg.connect(self._conninfo, autocommit=True, prepare_threshold=self._threshold)
        raw.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return raw

    def _enter(self, raw: psycopg.Connection[Any]) -> Any:
        raw.cursor_factory, raw.row_factory = _Cursor, psycopg.rows.tuple_row  # a handler may have set others
        self._transaction = psycopg.Transaction(raw)
        self._transaction.__enter__()
        return raw

    def commit(self) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is None or transaction.connection.closed:  # psycopg would say nothing
            raise DatabaseUnavailable("The connection to PostgreSQL was lost before COMMIT.")
        transaction.__exit__(None, None, None)

    def _undo(self) -> None:
        transaction, self._transaction = self._transaction, None
        if transaction is not None:
            undo = psycopg.Rollback(transaction)
            transaction.__exit__(type(undo), undo, None)

    def _shut(self) -> None:
        if self.raw is not None:
            self.raw.close()


def conninfo_of(settings: PoolSettings) -> str:
    """The pool's address for libpq.

    Raises:
        ConfigurationError: libpq cannot read it.
    """
    try:
        given = conninfo_to_dict(settings.dsn)
        session = {"application_name": "soma-common", **settings.settings}
        options = [f"-c {name}={_escaped(value)}" for name, value in session.items()]
        if given.get("options"):
            options.insert(0, str(given["options"]))
        wanted: dict[str, Any] = {
            "connect_timeout": max(2, round(settings.timeout)),
            **given,
            "options": " ".join(options),
        }
        return make_conninfo(**wanted)
    except psycopg.ProgrammingError as error:
        raise ConfigurationError(
            f"The PostgreSQL address cannot be read by libpq: {str(error).strip()}.",
            cure="handlers that are plain functions use psycopg: write SOMASTACK_POSTGRES_DSN with libpq's parameters.",
        ) from error


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(" ", "\\ ")
