"""Apicurio Registry 3 on a PostgreSQL database, from Maven's archive and ``deployments/config/apicurio``."""

from __future__ import annotations

import json
import signal
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote, urlsplit

from soma_common.errors import ServerUnavailable
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.jars import Jars
from soma_common.testing.lane.java import find_java
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch, PortTaken, ServerProcess

_JAVA = 21
_HEAP = ("-Xms64m", "-Xmx256m")
_DRAWS = 8


@dataclass(frozen=True, slots=True)
class _Settings:
    dsn: str
    http: int
    management: int


class ApicurioServer:
    """A schema registry of our own: make with ``start`` or ``attach``; a context manager."""

    version = "3.3.3"

    def __init__(self, folder: Path, settings: _Settings) -> None:
        self.process = ServerProcess("Apicurio Registry", folder)
        self._settings = settings
        self._jars = Jars("apicurio").ensure()
        self._java = find_java(_JAVA)

    @classmethod
    def start(cls, dsn: str, *, parent: Path | None = None) -> ApicurioServer:
        """Start a registry that stores into the database ``dsn`` (a database of its own).

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the end of the registry's log.
        """
        Jars("apicurio").ensure()  # before anything is made
        server = cls(scratch_folder("apicurio", parent), _Settings(dsn, free_port(), free_port()))
        for _ in range(_DRAWS):
            server._remember()
            try:
                server.process.start(server._launch())
            except PortTaken:
                server._settings = _Settings(dsn, free_port(), free_port())
            except BaseException:
                server.process.abandon()
                raise
            else:
                return server
        server.close()
        raise ServerUnavailable(f"Lost the race for a port {_DRAWS} times.", cure="try again.")

    @classmethod
    def attach(cls, folder: Path) -> ApicurioServer:
        """The registry that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Settings(**json.loads((folder / "settings.json").read_text())))

    @property
    def folder(self) -> Path:
        return self.process.folder

    @property
    def log_path(self) -> Path:
        return self.process.log_path

    @property
    def url(self) -> str:
        """The base address; the API is below ``/apis/registry/v3``."""
        return f"http://{self.address}"

    @property
    def address(self) -> str:
        return f"{LOOPBACK}:{self._settings.http}"

    def start_again(self) -> None:
        """Start the stopped or killed registry on the same database and ports."""
        self.process.start(self._launch())

    def stop(self) -> None:
        """An orderly end (SIGTERM), then SIGKILL after a bound."""
        self.process.end(signal.SIGTERM, within=10.0)

    def restart(self) -> None:
        """Stop in an orderly way and start again."""
        self.stop()
        self.start_again()

    def kill(self) -> None:
        """SIGKILL the registry."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP the registry."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT the registry."""
        self.process.resume()

    def close(self) -> None:
        """End the registry and delete its folder; the database is the caller's."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _remember(self) -> None:
        file = self.folder / "settings.json"
        file.touch(mode=0o600)
        known = self._settings
        file.write_text(json.dumps({"dsn": known.dsn, "http": known.http, "management": known.management}))

    def _launch(self) -> Launch:
        app, known = self._jars / "app", self._settings
        return Launch(
            command=[self._java, *_HEAP, "-jar", str(app / "quarkus-run.jar")],
            ready=self._ready,
            env=environment(known.dsn, http=known.http, management=known.management, config=_config()),
            stop=signal.SIGKILL,
            grace=5.0,
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
