"""Kafka as one KRaft node on loopback, from Maven's jars and ``deployments/config/kafka/server.properties``."""

from __future__ import annotations

import base64
import json
import signal
import subprocess
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from soma_common.errors import ServerUnavailable
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.jars import Jars
from soma_common.testing.lane.java import find_java
from soma_common.testing.lane.kafka_wire import Topic, broker_count, create_topic
from soma_common.testing.lane.ports import LOOPBACK, free_port
from soma_common.testing.lane.process import Launch, PortTaken, ServerProcess

_JAVA = 17
_HEAP = ("-Xms256m", "-Xmx1g")
_GRACE = 20.0  # seconds of a controlled shutdown
_DRAWS = 8


@dataclass(frozen=True, slots=True)
class _Ports:
    broker: int
    controller: int


class KafkaServer:
    """A broker of our own: make with ``start`` or ``attach``; a context manager."""

    version = "4.3.1"

    def __init__(self, folder: Path, ports: _Ports) -> None:
        self.process = ServerProcess("Kafka", folder)
        self._ports = ports
        self._jars = Jars("kafka").ensure()
        self._java = find_java(_JAVA)

    @classmethod
    def start(cls, *, settings: Mapping[str, str] | None = None, parent: Path | None = None) -> KafkaServer:
        """Format a folder (under ``parent``) and start a broker; ``settings`` go on top of the file's.

        Raises ServerUnavailable: Java or Maven missing, jars changed, or the end of the broker's log.
        """
        Jars("kafka").ensure()  # before anything is made
        server = cls(scratch_folder("kafka", parent), _Ports(free_port(), free_port()))
        for _ in range(_DRAWS):
            server._write_properties(settings or {})
            try:
                server._format_once()
                server.process.start(server._launch())
            except PortTaken:
                server._ports = _Ports(free_port(), free_port())
            except BaseException:
                server.process.abandon()
                raise
            else:
                return server
        server.close()
        raise ServerUnavailable(f"Lost the race for a port {_DRAWS} times.", cure="try again.")

    @classmethod
    def attach(cls, folder: Path) -> KafkaServer:
        """The broker that another process started in ``folder``, for as long as one of its users lives."""
        return cls(folder, _Ports(**json.loads((folder / "settings.json").read_text())))

    @property
    def folder(self) -> Path:
        return self.process.folder

    @property
    def log_path(self) -> Path:
        return self.process.log_path

    @property
    def bootstrap(self) -> str:
        """Host and port for any Kafka client."""
        return f"{LOOPBACK}:{self._ports.broker}"

    @property
    def address(self) -> str:
        return self.bootstrap

    def create_topic(self, topic: Topic) -> None:
        """Create a topic and return when the broker knows it."""
        create_topic(self.bootstrap, topic)

    def start_again(self) -> None:
        """Start the stopped or killed broker on the same folder and ports."""
        self.process.start(self._launch())

    def stop(self) -> None:
        """A controlled shutdown (SIGTERM), then SIGKILL after a bound."""
        self.process.end(signal.SIGTERM, within=_GRACE)

    def restart(self) -> None:
        """Stop in an orderly way and start again."""
        self.stop()
        self.start_again()

    def kill(self) -> None:
        """SIGKILL the broker."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP the broker."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT the broker."""
        self.process.resume()

    def close(self) -> None:
        """End the broker and delete its folder."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def _properties(self) -> Path:
        return self.folder / "server.properties"

    def _write_properties(self, settings: Mapping[str, str]) -> None:
        """The shared file, then what this machine needs: of two equal keys the later one counts."""
        shared = (deployments_folder() / "config" / "kafka" / "server.properties").read_text()
        broker, controller = (
            f"{LOOPBACK}:{self._ports.broker}",
            f"{LOOPBACK}:{self._ports.controller}",
        )
        ours = {
            "listeners": f"INTERNAL://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"INTERNAL://{broker}",
            "controller.quorum.voters": f"1@{controller}",
            "log.dirs": str(self.folder / "data"),
            **settings,
        }
        lines = "".join(f"{key}={value}\n" for key, value in ours.items())
        self._properties.write_text(f"{shared}\n# Overrides of this broker\n{lines}")
        (self.folder / "settings.json").write_text(json.dumps(asdict(self._ports)))

    def _format_once(self) -> None:
        if (self.folder / "data" / "meta.properties").exists():
            return
        cluster = cluster_id(uuid.uuid4().bytes)
        command = [
            *self._run_class("kafka.tools.StorageTool", "-Xmx128m", "-XX:TieredStopAtLevel=1"),
            "format",
        ]
        command += ["-t", cluster, "-c", str(self._properties)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ServerUnavailable(f"Kafka could not format its folder: {done.stdout}{done.stderr}")

    def _launch(self) -> Launch:
        return Launch(
            command=[*self._run_class("kafka.Kafka", *_HEAP), str(self._properties)],
            ready=self._ready,
            stop=signal.SIGKILL,  # the guard's way when nobody uses the broker any more: its data are deleted
            grace=5.0,
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
