"""A service of the shop in a process of its own, which tests kill: python -m tests.integration.sagas.shop_process.

Its settings are in ``SHOP_CONFIG``, as JSON; without Kafka it does the parts of both services.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from soma_common.app import Soma
from soma_common.config import SomaConfig
from soma_common.deployment import DeployMode
from tests.integration.sagas.shop import AT_ONCE, MODELS, of_stock, standalone, whole


@contextmanager
def process(dsn: str, **kafka: Any) -> Iterator[subprocess.Popen[str]]:
    """The process, killed at the end. ``kafka``: ``config`` of :class:`SomaConfig`, ``name`` and ``topics``."""
    command = [sys.executable, "-m", "tests.integration.sagas.shop_process"]
    env = os.environ | {"SHOP_DSN": dsn, "SHOP_KAFKA": json.dumps(kafka), "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == "ready\n"
            yield running
        finally:
            running.kill()


def _application(dsn: str, kafka: dict[str, Any]) -> Soma:
    if not kafka:
        return Soma(standalone(dsn), models=MODELS, choreographies=[whole()], settings=AT_ONCE)
    part = of_stock(kafka["name"])
    config = SomaConfig(mode=DeployMode.SOMASTACK, postgres_dsn=dsn, **kafka["config"])
    reads = {part.consumer: kafka["topics"]}
    return Soma(config, models=MODELS, choreographies=[part], reads=reads, settings=AT_ONCE)


async def _main() -> None:
    soma = _application(os.environ["SHOP_DSN"], json.loads(os.environ["SHOP_KAFKA"]))
    asyncio.get_running_loop().call_soon(lambda: print("ready", flush=True))
    await soma.run(relay=True)


if __name__ == "__main__":
    asyncio.run(_main())
