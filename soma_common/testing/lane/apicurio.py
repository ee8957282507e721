"""Apicurio Registry 3 on a PostgreSQL database, from Maven's archive and ``deployments/config/apicurio``."""

from __future__ import annotations

import json
import signal
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.jars import Jars
from soma_common.testing.lane.java import QUICK_START, find_java
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch
from soma_common.testing.lane.server import LaneServer, Settings, made_once, remembered

_JAVA = 21
_HEAP = ("-Xms64m", "-Xmx256m")


@dataclass(frozen=True, slots=True)
class _Settings(Settings):
    dsn: str
    http: int
    management: int

    def redrawn(self) -> Self:
        return replace(self, http=free_port(), management=free_port())


class ApicurioServer(LaneServer[_Settings]):
    """A schema registry of our own: make with ``start`` or ``attach``; its database is the caller's."""

    version = "3.3.3"
    _grace = 10.0

    def __init__(self, folder: Path, settings: _Settings) -> None:
        super().__init__("Apicurio Registry", folder, settings)
        self._jars = Jars("apicurio").ensure()
        self._java = find_java(_JAVA)

    @classmethod
    def start(cls, dsn: str, *, parent: Path | None = None) -> ApicurioServer:
        """Start a registry that stores into the database ``dsn`` (a database of its own).

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the end of the registry's log.
        """
        Jars("apicurio").ensure()  # before anything is made
        return cls(scratch_folder("apicurio", parent), _Settings(dsn, free_port(), free_port()))._start_first()

    @classmethod
    def lasting(cls, folder: Path, dsn: str, *, port: int | None = None) -> ApicurioServer:
        """The registry of a folder that lasts, on the database ``dsn``; ``serve`` starts it. ``port``: None: drawn.

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the folder is no registry's.
        """
        Jars("apicurio").ensure()
        with made_once(folder) as known:
            settings = _Settings(**(known | {"dsn": dsn})) if known else _Settings(dsn, free_port(), free_port())
            server = cls(folder, settings if port is None else replace(settings, http=port))
            server._remember()
        return server

    @classmethod
    def attach(cls, folder: Path) -> ApicurioServer:
        """The registry that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Settings(**remembered(folder)))

    @property
    def url(self) -> str:
        """The base address; the API is below ``/apis/registry/v3``."""
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._settings.http}"

    def _prepare(self) -> None:
        """Everything is told through the environment."""

    def _launch(self, within: float) -> Launch:
        app, known = self._jars / "app", self._settings
        return Launch(
            command=[self._java, *QUICK_START, *_HEAP, "-jar", str(app / "quarkus-run.jar")],
            ready=self._ready,
            env=environment(known.dsn, http=known.http, management=known.management, config=_config()),
            stop=signal.SIGKILL,
            grace=5.0,
            within=within,
        )

    def _ready(self) -> bool:
        """The right version answers, and so does a question that needs the database."""
        try:
            return bool(self._get("system/info")["version"] == self.version and "groups" in self._get("groups?limit=1"))
        except (OSError, ValueError, KeyError):
            return False

    def _get(self, path: str) -> dict[str, object]:
        with urllib.request.urlopen(f"{self.url}/apis/registry/v3/{path}", timeout=5) as answer:
            return dict(json.load(answer))


def _config() -> Path:
    return deployments_folder() / "config" / "apicurio" / "application.properties"


def environment(dsn: str, *, http: int, management: int, config: Path) -> dict[str, str]:
    """The registry's environment: its database, its ports on loopback, and where it finds its configuration."""
    database = urlsplit(dsn)
    return {
        "QUARKUS_CONFIG_LOCATIONS": config.as_uri(),
        "APICURIO_DATASOURCE_URL": f"jdbc:postgresql://{database.hostname}:{database.port}{database.path}",
        "APICURIO_DATASOURCE_USERNAME": unquote(database.username or ""),
        "APICURIO_DATASOURCE_PASSWORD": unquote(database.password or ""),
        "QUARKUS_HTTP_HOST": LOOPBACK,
        "QUARKUS_HTTP_PORT": str(http),
        "QUARKUS_MANAGEMENT_HOST": LOOPBACK,
        "QUARKUS_MANAGEMENT_PORT": str(management),
    }
