"""The error tree, and PostgreSQL's errors in its words."""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import asyncpg
import psycopg
import pytest

from soma_common import errors
from soma_common.postgres.errors import is_connection_loss, translate, translated, translated_around_callers
from soma_common.postgres.pool import Pool, PoolSettings


def _tree(kind: type[errors.SomaError]) -> Iterator[type[errors.SomaError]]:
    yield kind
    for inner in kind.__subclasses__():
        if inner.__module__ == errors.__name__:
            yield from _tree(inner)


def test_the_docstring_draws_the_tree() -> None:
    drawn = {word for line in (errors.__doc__ or "").splitlines() for word in line.split() if word.isidentifier()}
    for kind in _tree(errors.SomaError):
        assert kind.__name__ in drawn
        assert (kind.__doc__ or "").strip()


def test_the_docstring_is_the_default_message() -> None:
    assert str(errors.LeaseLost()) == "Another worker owns this shard now."
    error = errors.ClockAhead("Fast.", cure="set the clock.")
    assert (error.message, error.cure, str(error)) == ("Fast.", "set the clock.", "Fast. Cure: set the clock.")
    for kind in (errors.ClusterChanged, errors.LogRewound, errors.CursorLost, errors.TenantRequired):
        assert kind().cure
    assert errors.WrongExpectedVersion("a:b:c", "version 3", 5).actual == 5


@pytest.mark.parametrize(
    ("driver_error", "kind"),
    [
        (asyncpg.SerializationError("x"), errors.TransactionConflict),
        (asyncpg.DeadlockDetectedError("x"), errors.TransactionConflict),
        (psycopg.errors.SerializationFailure("x"), errors.TransactionConflict),
        (asyncpg.InsufficientPrivilegeError("x"), errors.ConfigurationError),
        (asyncpg.UndefinedTableError("x"), errors.MigrationError),
        (asyncpg.InvalidPasswordError("x"), errors.DatabaseUnavailable),
        (asyncpg.TooManyConnectionsError("x"), errors.DatabaseUnavailable),
        (asyncpg.AdminShutdownError("x"), errors.DatabaseUnavailable),
        (asyncpg.ConnectionDoesNotExistError("x"), errors.DatabaseUnavailable),
        (asyncpg.InterfaceError("connection is closed"), errors.DatabaseUnavailable),
        (psycopg.OperationalError("the connection is lost"), errors.DatabaseUnavailable),
        (asyncpg.CharacterNotInRepertoireError("x"), errors.PayloadInvalid),
        (asyncpg.ProgramLimitExceededError("x"), errors.EventTooLarge),
    ],
)
def test_drivers_errors_have_names(driver_error: Exception, kind: type[errors.SomaError]) -> None:
    assert type(translate(driver_error)) is kind
    with pytest.raises(kind) as caught, translated():
        raise driver_error
    assert caught.value.__cause__ is driver_error


@pytest.mark.parametrize("error", [ValueError("x"), OSError("disk"), TimeoutError(), asyncpg.UniqueViolationError("x"),
                                   asyncpg.InterfaceError("cannot perform operation")])  # fmt: skip
def test_what_is_not_about_the_database_is_left_alone(error: Exception) -> None:
    assert translate(error) is None
    assert not is_connection_loss(error)
    for block in (translated, translated_around_callers):
        with pytest.raises(type(error)), block():
            raise error


def test_callers_statements_keep_their_own_errors() -> None:
    for mine in (asyncpg.CheckViolationError("x"), asyncpg.UndefinedTableError("x")):
        with pytest.raises(type(mine)), translated_around_callers():
            raise mine
    for ours in (asyncpg.SerializationError("x"), asyncpg.AdminShutdownError("x")):
        with pytest.raises(errors.SomaError), translated_around_callers():
            raise ours
    with pytest.raises(errors.LeaseLost), translated():
        raise errors.LeaseLost


async def test_a_refused_connection_is_a_database_that_is_away() -> None:
    with pytest.raises(errors.DatabaseUnavailable), translated():
        await asyncpg.connect("postgresql://u@127.0.0.1:1/db", timeout=5)
    with pytest.raises(errors.DatabaseUnavailable), translated():
        psycopg.connect("postgresql://u@127.0.0.1:1/db", connect_timeout=5)


def test_every_error_can_be_made_without_arguments() -> None:
    for kind in _tree(errors.SomaError):
        parameters = list(inspect.signature(kind).parameters.values())
        if all(p.default is not p.empty for p in parameters):
            assert str(kind())


async def test_an_address_that_the_driver_cannot_read_is_a_wrong_setting() -> None:
    async with Pool(PoolSettings("postgresql://u:secret@127.0.0.1:1/d?sslmode=bogus")) as pool:
        with pytest.raises(errors.ConfigurationError, match="sslmode") as caught:
            await pool.fetch("SELECT 1")
    assert "SOMASTACK_POSTGRES_DSN" in str(caught.value.cure)
    assert "secret" not in str(caught.value)
