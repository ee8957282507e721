"""The relay's command: its name."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

from click.testing import CliRunner

from soma_common import DeployMode, SomaConfig
from soma_common.cli import relay as command
from soma_common.postgres.pool import Pool
from soma_common.wiring import make_relay


def test_a_relay_without_a_name_is_refused() -> None:
    done = CliRunner().invoke(command.relay, [], env={"SOMA_SERVICE_ID": None})
    assert done.exit_code == 2
    assert "SOMA_SERVICE_ID" in done.output


def test_the_command_and_the_application_name_the_relay_alike() -> None:
    async def application() -> str:
        config = SomaConfig(mode=DeployMode.SOMASTACK, service_id="shop", kafka_bootstrap="h:1")
        async with AsyncExitStack() as closing:
            return make_relay(config, Pool("postgresql://h/d"), closing).reader

    name = next(option for option in command.relay.params if option.name == "name")
    assert name.envvar == "SOMA_SERVICE_ID"
    assert asyncio.run(application()) == "relay:shop"
