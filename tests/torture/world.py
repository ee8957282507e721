"""The servers of a run, its tables, its folder and its processes."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from soma_common.testing.lane.kafka import KafkaServer
from soma_common.testing.lane.kafka_wire import Topic
from soma_common.testing.lane.postgres import PostgresServer, Standby
from soma_common.testing.run import apply_migrations
from tests.torture.children import Child, kill_all
from tests.torture.settings import PARTITIONS, TOPIC, Settings

TABLES = """
CREATE TABLE facts (event_id uuid NOT NULL, unit text NOT NULL);
CREATE TABLE effects (
    seq bigserial PRIMARY KEY, event_id uuid NOT NULL, key text NOT NULL, version bigint NOT NULL,
    previous bigint NOT NULL, applied_by text NOT NULL, consumer text NOT NULL
);
CREATE INDEX ON effects (consumer, event_id);
CREATE TABLE applied (consumer text, key text, version bigint NOT NULL, PRIMARY KEY (consumer, key));
"""
# A broker that was killed may register again once its last session has ended: milliseconds.
BROKER = {"broker.session.timeout.ms": "3000", "broker.heartbeat.interval.ms": "500"}
# Nothing is flushed before a commit asks for it: what was not made durable is lost by a crash.
LAZY = {"wal_writer_delay": "10s", "wal_writer_flush_after": "64MB", "checkpoint_timeout": "30min"}


class World:
    """Real servers and real processes; a context manager that ends all of them."""

    def __init__(self, settings: Settings, *, kafka: bool = True, postgres: Mapping[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="soma-torture-"))
        self.children: list[Child] = []
        self.failures: list[str] = []
        self.standby: Standby | None = None
        self.postgres: PostgresServer | None = None
        self.kafka: KafkaServer | None = None
        self.keep = False
        self.ends: Mapping[int, int] = {}
        try:
            self.database = PostgresServer.start(settings={**LAZY, **(postgres or {})})
            self.postgres = self.database
            self.kafka = KafkaServer.start(settings=BROKER) if kafka else None
            bootstrap = self.kafka.bootstrap if self.kafka else ""
            self.settings = replace(settings, bootstrap=bootstrap)
            self._prepare()
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> None:
        if self.kafka is not None:
            self.kafka.create_topic(Topic(TOPIC, partitions=PARTITIONS))
        self.settings.save(self.folder)
        self.point_at(self.database)
        apply_migrations(self.database.dsn)
        self.database.sql.query(TABLES)

    def point_at(self, server: PostgresServer) -> None:
        """Let every process that starts from now on use this server."""
        (self.folder / "dsn").write_text(server.dsn)

    def add(self, role: str, name: str) -> Child:
        """One more place in the run, filled at once."""
        child = Child(role, name, self.folder)
        self.children.append(child)
        child.start()
        return child

    def of(self, role: str) -> list[Child]:
        """The children of one role."""
        return [child for child in self.children if child.role == role]

    def all_failures(self) -> list[str]:
        """What went wrong with processes, in words."""
        return [*self.failures, *(failure for child in self.children for failure in child.failures)]

    def fail_over(self, *, between: Callable[[], None]) -> None:
        """The primary dies; its standby is promoted at the same address, as behind a virtual one."""
        assert self.standby is not None
        port = self.database.port
        self.database.kill()
        between()
        self.standby.stop()
        self.standby.move(port)
        self.standby.start_again()
        self.standby.promote()
        self.database = self.standby

    def close(self) -> None:
        """End everything; the folder goes too unless it is to be kept."""
        kill_all(self.children)
        for server in (self.kafka, self.standby, self.postgres):
            if server is not None:
                server.close()
        if not self.keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(KeyboardInterrupt):
            self.close()
