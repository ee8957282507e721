"""What the three services share: how each is made, and how its process runs."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading

from examples.choreography.events import MODELS, TOPICS
from soma_common import Choreography, Soma, SomaConfig
from soma_common.deployment import DeployMode


def application(service: str, order: Choreography) -> Soma:
    """A service. It reads the topics of all three; the one where choreographies meet comes by itself."""
    config = SomaConfig(
        mode=DeployMode.SOMASTACK,
        service_id=service,
        postgres_dsn=os.environ.get(f"{service.upper()}_DSN", ""),
        kafka_bootstrap=os.environ.get("SOMASTACK_KAFKA_BOOTSTRAP", ""),
    )
    return Soma(config, models=MODELS, choreographies=[order], reads={order.consumer: TOPICS})


def serve(soma: Soma, table: str) -> None:
    """Run a service until SIGTERM, or until who started it is gone."""
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)  # it tells every attempt, the library each change
    threading.Thread(target=_end_with_parent, daemon=True).start()
    asyncio.run(_serve(soma, table))


async def _serve(soma: Soma, table: str) -> None:
    async with soma, soma.pool.connection() as connection:
        await connection.execute(table)
    await soma.run(relay=True)


def _end_with_parent() -> None:
    os.read(sys.stdin.fileno(), 1)  # without Python's buffer, which would be locked while the process ends
    os.kill(os.getpid(), signal.SIGTERM)
