"""One table from what PostgreSQL says to what the library says."""

from __future__ import annotations

from contextlib import AbstractContextManager

from soma_common import errors

# SQLSTATE -> the library's error and what to do about it.
_BY_SQLSTATE: dict[str, tuple[type[errors.SomaError], str | None]] = {
    "SC001": (errors.ClusterChanged, None),
    "SC002": (errors.LogRewound, None),
    "SC003": (errors.AppendError, "record a new event that corrects the old one; recorded events never change."),
    "SC004": (errors.WrongIsolation, "use a connection in READ COMMITTED, the default."),
    "SC005": (errors.ValidationError, None),
    "SC006": (errors.EventsArchived, None),
    "SC007": (errors.LeaseLost, "wait until it ends."),
    "SC008": (
        errors.HandlerFailed,
        "leave COMMIT and ROLLBACK to the consumer, undo by savepoints, and name your own in SET CONSTRAINTS.",
    ),
    "SC009": (errors.DatabaseSetBack, "nothing is to be done: the consumer begins again at its stored positions."),
    "SC010": (errors.SagaError, "what people do to sagas is written beside it: `somastack saga --help`."),
    "40001": (errors.TransactionConflict, "run the whole transaction again."),
    "40P01": (errors.TransactionConflict, "run the whole transaction again."),
    "22021": (errors.PayloadInvalid, "PostgreSQL text cannot hold NUL bytes or broken UTF-8: remove them."),
    "22P02": (errors.PayloadInvalid, "payload and metadata must be JSON."),
    "22P05": (errors.PayloadInvalid, "PostgreSQL text cannot hold NUL bytes or broken UTF-8: remove them."),
    "22030": (errors.PayloadInvalid, "payload and metadata must be JSON."),
    "23514": (
        errors.ValidationError,
        "names have 1 to 512 bytes, payload and metadata are JSON objects in their limits.",
    ),
    "54000": (errors.EventTooLarge, "shorten it, and keep large data elsewhere."),
    "3F000": (errors.MigrationError, "run `somastack db upgrade`."),
    "42P01": (errors.MigrationError, "run `somastack db upgrade`."),
    "42703": (errors.MigrationError, "run `somastack db upgrade`."),
    "42883": (errors.MigrationError, "run `somastack db upgrade`."),
    "42501": (errors.ConfigurationError, "grant the role its rights: `somastack db upgrade --grant-to ROLE`."),
    "28P01": (errors.DatabaseUnavailable, "check user and password in SOMASTACK_POSTGRES_DSN."),
    "28000": (errors.DatabaseUnavailable, "check user and pg_hba.conf of the server."),
    "3D000": (errors.DatabaseUnavailable, "create the database named in SOMASTACK_POSTGRES_DSN."),
    "25006": (
        errors.DatabaseUnavailable,
        "this server is a standby (or read-only): wait for its promotion, or name the primary.",
    ),
    "53100": (errors.DatabaseUnavailable, "the server's disk is full: free space."),
    "26000": (
        errors.ConfigurationError,
        "a transaction pooler sits between: set SOMASTACK_POSTGRES_POOLER=transaction.",
    ),
    "42P05": (
        errors.ConfigurationError,
        "a transaction pooler sits between: set SOMASTACK_POSTGRES_POOLER=transaction.",
    ),
}
# Classes of SQLSTATE that mean "the server is not there for us just now".
_AWAY = ("08", "57P", "53", "58")

# How asyncpg says that a connection is gone. "Released": its pool takes a broken one back at once. "Operation (2)": the
# server ended an idle session, and its last message is read while the next statement is about to be sent.
# "Free connection holder": the pool took it back while we gave it back.
_LOST = (
    "closed",
    "connection was lost",
    "connection has been released",
    "another operation (2) is in progress",
    "called on a free connection holder",
)

_ADDRESS = "mend the parameters of SOMASTACK_POSTGRES_DSN (postgresql://user:password@host:5432/database?sslmode=…)."
_CONNECT = "check that the server runs and that SOMASTACK_POSTGRES_DSN names it."


def translate(error: BaseException) -> errors.SomaError | None:
    """The library's error for a driver's, or None when it is not about the database (or a caller's own mistake)."""
    if isinstance(error, errors.SomaError):
        return error
    error = _of_driver(error)
    state = getattr(error, "sqlstate", None)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if state in _BY_SQLSTATE:
        kind, cure = _BY_SQLSTATE[state]
        return kind(f"PostgreSQL refused: {text}.", cure=cure) if cure else kind(f"PostgreSQL refused: {text}.")
    if state is not None and state.startswith(_AWAY):
        return errors.DatabaseUnavailable(f"PostgreSQL is not available: {text}.", cure=_CONNECT)
    if _is_wrong_address(error):
        return errors.ConfigurationError(f"The PostgreSQL address cannot be used: {text}.", cure=_ADDRESS)
    if is_connection_loss(error):
        return errors.DatabaseUnavailable(f"The connection to PostgreSQL failed: {text}.", cure=_CONNECT)
    return None


def is_connection_loss(error: BaseException) -> bool:
    """Whether the connection is gone, so that the outcome of what was sent is unknown."""
    error = _of_driver(error)
    if isinstance(error, OSError | TimeoutError):
        return _raised_by_driver(error)
    state = getattr(error, "sqlstate", None) or ""
    if state.startswith(("08", "57P")):
        return True
    # Named, not imported: a driver that is not installed must not be loaded for this.
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(error).__mro__}
    if "psycopg.OperationalError" in names:
        return not state
    if "asyncpg.InterfaceError" in names or "asyncpg.InternalClientError" in names:
        text = str(error)
        return any(words in text for words in _LOST)
    return False


def _is_wrong_address(error: BaseException) -> bool:
    """Whether the driver could not read its address; told when it first connects."""
    return any(kind.__name__ == "ClientConfigurationError" for kind in type(error).__mro__)


def _of_driver(error: BaseException) -> BaseException:
    """The driver's error: Django wraps it into one of its own."""
    return (error.__cause__ or error) if type(error).__module__ == "django.db.utils" else error


def _raised_by_driver(error: BaseException) -> bool:
    """Whether an OSError came out of a driver, not out of what else ran inside the block."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__", "").partition(".")[0] in ("asyncpg", "psycopg", "psycopg_pool"):
            return True
        step = step.tb_next
    return False


def is_from_driver(error: BaseException) -> bool:
    """Whether a database driver raised this: about the statement or its values, not about our own code."""
    kinds = type(_of_driver(error)).__mro__
    return any(kind.__module__.split(".")[0] in ("asyncpg", "psycopg") for kind in kinds)


def sqlstate_of(error: BaseException) -> str | None:
    """What PostgreSQL said, if it was PostgreSQL that said something."""
    state = getattr(_of_driver(error), "sqlstate", None)
    return state if isinstance(state, str) else None


class _Translated(AbstractContextManager[None]):
    """Raises the library's errors, if they are of these kinds, in place of the driver's.

    A class and not a generator: it is around every statement, and entering a generator takes several microseconds.
    """

    def __init__(self, *kinds: type[errors.SomaError]) -> None:
        self._kinds = kinds

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, Exception):
            return
        known = translate(error)
        if known is not None and known is not error and isinstance(known, self._kinds):
            raise known from error


_OURS = _Translated(errors.SomaError)
_CALLERS = _Translated(errors.InfrastructureError, errors.TransactionConflict, errors.LogError)


def translated() -> AbstractContextManager[None]:
    """Raises the library's errors in place of the driver's: around the library's own statements."""
    return _OURS


def translated_around_callers() -> AbstractContextManager[None]:
    """The same around a caller's statements: only what is about the server, the log or a conflict is ours to name.

    What else goes wrong there (a constraint of their own table, their own OSError) stays as it is.
    """
    return _CALLERS
