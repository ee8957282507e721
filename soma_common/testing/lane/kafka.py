"""Kafka as one KRaft node on loopback, from Maven's jars and ``deployments/config/kafka/server.properties``."""

from __future__ import annotations

import base64
import signal
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from soma_common.errors import ServerUnavailable
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.jars import Jars
from soma_common.testing.lane.java import QUICK_START, find_java
from soma_common.testing.lane.kafka_wire import Topic, broker_count, create_topic
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch
from soma_common.testing.lane.server import LaneServer, Settings, made_once, making_folder, remembered

_JAVA = 17
_HEAP = ("-Xms256m", "-Xmx1g")


@dataclass(frozen=True, slots=True)
class _Settings(Settings):
    broker: int
    controller: int
    lasting: bool

    def redrawn(self) -> Self:
        return replace(self, broker=free_port(), controller=free_port())


class KafkaServer(LaneServer[_Settings]):
    """A broker of our own: make with ``start`` or ``attach``; a context manager."""

    version = "4.3.1"

    def __init__(self, folder: Path, settings: _Settings, *, properties: Mapping[str, str] | None = None) -> None:
        super().__init__("Kafka", folder, settings)
        self._given = properties or {}
        self._jars = Jars("kafka").ensure()
        self._java = find_java(_JAVA)

    @classmethod
    def start(
        cls,
        *,
        settings: Mapping[str, str] | None = None,
        parent: Path | None = None,
        lasting: bool = False,
    ) -> KafkaServer:
        """Format a folder (under ``parent``) and start a broker; ``settings`` go on top of the file's.

        A broker starts in half the processor time and is not quick; ``lasting`` makes it quick, for benchmarks.

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the end of the broker's log.
        """
        Jars("kafka").ensure()  # before anything is made
        folder = scratch_folder("kafka", parent)
        return cls(folder, _Settings(free_port(), free_port(), lasting), properties=settings)._start_first()

    @classmethod
    def lasting(cls, folder: Path, *, port: int | None = None) -> KafkaServer:
        """The broker of a folder whose data last, made where it is new; ``serve`` starts it. ``port``: None: drawn.

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the folder is no broker's.
        """
        Jars("kafka").ensure()
        with made_once(folder) as known:
            settings = _Settings(**known) if known else _Settings(free_port(), free_port(), lasting=True)
            server = cls(folder, settings if port is None else replace(settings, broker=port))
            if known is None:
                server._prepare()
                server._remember()
        return server

    @classmethod
    def attach(cls, folder: Path) -> KafkaServer:
        """The broker that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Settings(**remembered(folder)))

    @property
    def bootstrap(self) -> str:
        """Host and port for any Kafka client."""
        return f"{LOOPBACK}:{self._settings.broker}"

    @property
    def address(self) -> str:
        return self.bootstrap

    def create_topic(self, topic: Topic) -> None:
        """Create a topic and return when the broker knows it."""
        create_topic(self.bootstrap, topic)

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _prepare(self) -> None:
        self._write_properties()
        self._format_once()

    def _write_properties(self) -> None:
        """The shared file, then what this machine needs: of two equal keys the later one counts."""
        shared = (deployments_folder() / "config" / "kafka" / "server.properties").read_text()
        broker, controller = self.bootstrap, f"{LOOPBACK}:{self._settings.controller}"
        ours = {
            "listeners": f"INTERNAL://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"INTERNAL://{broker}",
            "controller.quorum.voters": f"1@{controller}",
            "log.dirs": str(self.folder / "data"),
            **self._given,
        }
        lines = "".join(f"{key}={value}\n" for key, value in ours.items())
        self._properties.write_text(f"{shared}\n# Overrides of this broker\n{lines}")

    def _format_once(self) -> None:
        if (self.folder / "data" / "meta.properties").exists():
            return
        fresh, told = making_folder(self.folder), self.folder / "format.properties"
        told.write_text(f"{self._properties.read_text()}log.dirs={fresh}\n")
        cluster = cluster_id(uuid.uuid4().bytes)
        command = self._run_class("kafka.tools.StorageTool", "-Xmx128m", *QUICK_START)
        command += ["format", "-t", cluster, "-c", str(told)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerUnavailable(f"Kafka could not format its folder: {done.stdout}{done.stderr}")
        fresh.rename(self.folder / "data")

    def _launch(self, within: float) -> Launch:
        options = _HEAP if self._settings.lasting else (*_HEAP, *QUICK_START)
        return Launch(
            command=[*self._run_class("kafka.Kafka", *options), str(self._properties)],
            ready=self._ready,
            stop=signal.SIGKILL,  # the guard's way when nobody uses the broker any more: its data are deleted
            grace=5.0,
            within=within,
        )

    def _run_class(self, name: str, *options: str) -> list[str]:
        logging = deployments_folder() / "config" / "kafka" / "log4j2.properties"
        options += (
            f"-Dlog4j2.configurationFile={logging}",
            "-XX:+UseG1GC",
            "-Djava.awt.headless=true",
        )
        return [self._java, *options, "-cp", f"{self._jars}/*", name]

    def _ready(self) -> bool:
        try:
            return broker_count(self.bootstrap) == 1
        except OSError:
            return False


def cluster_id(number: bytes) -> str:
    """16 bytes as Kafka writes a cluster's id: base64 for addresses. Never with a leading ``-``, which Kafka's own
    tool would take for an option.
    """
    return base64.urlsafe_b64encode(bytes([number[0] & 0x7F]) + number[1:]).decode().rstrip("=")
