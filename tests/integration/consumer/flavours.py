"""Plain functions as handlers, on psycopg's connections and on Django's: what the tests of both share."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import django
from django.conf import settings as django_settings
from django.db import connections

from soma_common.postgres.pool import PoolSettings
from soma_common.postgres.threads import Connect, connecting

EFFECT = "INSERT INTO effect (event_id, tenant, key, number, worker) VALUES (%s, %s, %s, %s, %s)"
_NUMBERS = count()


def execute(tx: Any, sql: str, args: Any = None) -> list[Any]:
    """Run a statement on psycopg's connection or on Django's; its rows."""
    with tx.cursor() as cursor:
        cursor.execute(sql, args)
        rows: list[Any] = cursor.fetchall() if cursor.description else []
        return rows


def apply(event: Any, ctx: Any) -> None:
    """A row per application."""
    number = event.payload.get("n", 0) if isinstance(event.payload, dict) else 0
    given = (event.event_id, event.tenant_id, str(event.stream), number, threading.get_native_id())
    execute(ctx.tx, EFFECT, given)


class Flavour:
    """How handlers reach the database in a test: ``connect`` is for the worker."""

    def __init__(self, name: str, dsn: str, alias: str | None = None) -> None:
        self.name, self.alias = name, alias
        self.connect: Connect = connecting(PoolSettings(dsn), alias)

    @property
    def is_django(self) -> bool:
        return self.alias is not None


@contextmanager
def flavour_of(name: str, dsn: str, **options: Any) -> Iterator[Flavour]:
    """A flavour by name; for Django under an alias of its own, with these settings of a database."""
    if name == "psycopg":
        yield Flavour(name, dsn)
        return
    alias = f"test{next(_NUMBERS)}"
    if not django_settings.configured:
        django_settings.configure(USE_TZ=True, DEFAULT_AUTO_FIELD="django.db.models.BigAutoField")
        django.setup()
    connections.settings |= connections.configure_settings({"default": {}, alias: database_of(dsn) | options})
    try:
        yield Flavour(name, dsn, alias)
    finally:
        with suppress(AttributeError):  # this thread's; the handlers' threads close theirs themselves
            del connections[alias]
        del connections.settings[alias]


def database_of(dsn: str) -> dict[str, Any]:
    """A DSN as Django's settings of a database."""
    address = urlsplit(dsn)
    host = address.hostname or parse_qs(address.query).get("host", [""])[0]
    return {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": address.path[1:],
        "USER": address.username or "",
        "PASSWORD": unquote(address.password or ""),
        "HOST": host,
        "PORT": str(address.port or ""),
    }
