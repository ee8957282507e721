"""Definitions of sagas for commands: those of an application, or those that the database knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from soma_common.app import Soma
from soma_common.cli.loading import load
from soma_common.errors import ConfigurationError
from soma_common.sagas.graph import mermaid, mermaid_of_shape
from soma_common.sagas.models import Saga, check_sagas
from soma_common.sagas.views import KnownSaga

_MOST = 20  # names that an error lists

Found = TypeVar("Found")


def sagas_of(app: str) -> tuple[Saga, ...]:
    """The definitions that ``module:NAME`` stands for: a Soma's, one, or several.

    Raises:
        ConfigurationError: there is no such module or name, or it is none of these.
    """
    found = load(app, "application")
    if isinstance(found, Soma):
        return found.saga_definitions
    if isinstance(found, Saga):
        return (found,)
    if isinstance(found, Iterable) and not isinstance(found, str | bytes):
        return check_sagas(found)
    raise ConfigurationError(
        f"{app!r:.100} is a {type(found).__name__}.", cure="name a Soma, a Saga, or a list of sagas."
    )


def of_application(app: str, name: str, version: int | None) -> str:
    """A definition of an application, drawn.

    Raises:
        ConfigurationError: there is none of this name and version, or several.
    """
    known = {saga.key: saga for saga in sagas_of(app)}
    return mermaid(_chosen(known, name, version, f"{app!r:.100} has"))


def of_database(known: Sequence[KnownSaga], name: str, version: int | None) -> str:
    """The same of those that workers registered."""
    by_key = {(saga.name, saga.version): saga for saga in known}
    saga = _chosen(by_key, name, version, "Workers registered")
    return mermaid_of_shape(saga.name, saga.version, saga.shape)


def _chosen(known: Mapping[tuple[str, int], Found], name: str, version: int | None, who: str) -> Found:
    versions = sorted(each for named, each in known if named == name)
    if not versions:
        names = list(dict.fromkeys(named for named, _ in known))
        more = "" if len(names) <= _MOST else f" and {len(names) - _MOST} more"
        told = f"name one of {', '.join(names[:_MOST])}{more}." if names else "there are none yet."
        raise ConfigurationError(f"{who} no saga {name!r:.100}.", cure=told)
    if version is None and len(versions) > 1:
        raise ConfigurationError(
            f"{who} {len(versions)} versions of {name}.", cure=f"pass --version: {_told(versions)}."
        )
    if version is not None and version not in versions:
        raise ConfigurationError(f"{who} no version {version} of {name}.", cure=f"pass --version: {_told(versions)}.")
    return known[name, versions[-1] if version is None else version]


def _told(versions: Sequence[int]) -> str:
    return ", ".join(map(str, versions))
