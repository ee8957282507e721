"""What the example starts: one PostgreSQL with three databases, one Kafka, three processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from examples.choreography.events import SERVICES
from soma_common.testing.run import ServerRun

ROOT = Path(__file__).parents[2]
_PATIENCE = 30.0  # seconds


@contextmanager
def servers() -> Iterator[dict[str, str]]:
    """Settings that lead to a database for each service, and to Kafka."""
    run = ServerRun(os.environ)
    try:
        postgres = run.postgres()
        template = run.template(postgres)
        names = {service: f"example_{service}_{os.getpid()}" for service in SERVICES}
        dsns = {service: postgres.sql.create_database(name, template=template) for service, name in names.items()}
        yield {f"{service.upper()}_DSN": dsn for service, dsn in dsns.items()} | {
            "SOMASTACK_KAFKA_BOOTSTRAP": run.kafka().bootstrap
        }
        for name in names.values():
            postgres.sql.drop_database(name)
    finally:
        run.close()


@contextmanager
def processes(env: Mapping[str, str]) -> Iterator[None]:
    """The three services, each in a process of its own; all have ended well afterwards."""
    with ExitStack() as stack:
        running = [stack.enter_context(_process(service, env)) for service in SERVICES]
        yield
        for process in running:
            process.send_signal(signal.SIGTERM)
        codes = [process.wait(_PATIENCE) for process in running]
        if any(codes):
            raise RuntimeError(f"the services ended with {codes}")


@contextmanager
def _process(service: str, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", f"examples.choreography.{service}"]
    # A session of its own: Ctrl-C is for the example, which then ends its services.
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
    ) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                process.kill()
