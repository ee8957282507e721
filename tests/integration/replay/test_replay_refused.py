"""What is no replay: asked for at the beginning, told by name."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from soma_common.errors import (
    ConfigurationError,
    CursorLost,
    ReplayRefused,
    TenantRequired,
    ValidationError,
)
from soma_common.replay.models import ReplayFilter, ReplayMode
from tests.integration.replay.conftest import nothing


async def test_a_tick_that_is_gone_is_a_named_error(replays: Any) -> None:
    await replays.publish(5)
    await replays.passed_by()
    async with replays.engine() as engine:
        run = await engine.start(replays.everything)
        await replays.pool.fetch("UPDATE soma.ticks SET token = token + 1 WHERE tick_id > 0")
        with pytest.raises(CursorLost):
            await replays.finish(engine, run)


async def test_refusals(replays: Any) -> None:
    async with replays.engine() as engine:
        with pytest.raises(ReplayRefused, match="No consumer 'billing'"):
            await engine.start(replays.everything)
        await replays.pool.fetch("INSERT INTO soma.consumers (name) VALUES ('billing'), ('other')")
        with pytest.raises(ReplayRefused, match="no position in the log.*run it first"):
            await engine.start(replays.everything)
        await replays.pool.fetch(
            "INSERT INTO soma.consumer_offsets SELECT consumer_id, 't', 0, 1 FROM soma.consumers WHERE name = 'billing'"
        )
        with pytest.raises(ReplayRefused, match="reads Kafka, and no Kafka is named"):
            await engine.start(replays.everything)
        with pytest.raises(ReplayRefused, match="There is no replay"):
            await engine.pause(uuid4())
        for hostile in ("", "x", "'; DROP TABLE soma.replays; --", None, 7, b"\x00", "\0"):
            with pytest.raises(ValidationError, match="not a replay's id"):
                await engine.progress(hostile)
        for mode in ("", "Missing", None, 1, "every\0"):
            with pytest.raises(ValidationError, match="no mode"):
                await engine.start(replays.everything, mode)
        for rate in (0, -1, float("nan"), float("inf"), "5", True):
            with pytest.raises(ValidationError, match="rate"):
                await engine.start(replays.everything, rate=rate)
        for text in ("a\0b", "x" * 1001, "two\nlines", "\ud800", 5):
            with pytest.raises(ValidationError, match="line of text"):
                await engine.start(replays.everything, requested_by=text)


async def test_a_run_of_another_consumer(replays: Any) -> None:
    await replays.publish(5)
    await replays.passed_by()
    await replays.passed_by(nothing, consumer="other")
    async with replays.engine() as mine, replays.engine(consumer="other") as other:
        run = await mine.start(replays.everything)
        for verb in (other.pause, other.cancel, other.progress):
            with pytest.raises(ReplayRefused, match="is of consumer billing"):
                await verb(run.run_id)
        with pytest.raises(ReplayRefused, match="is of consumer billing"):
            await replays.finish(other, run)


def test_filters_that_cannot_be() -> None:
    for wanted, error in [
        ({}, TenantRequired), ({"tenant_id": ""}, TenantRequired), ({"tenant_id": "a\0"}, ValidationError),
        ({"tenant_id": "t", "since": datetime(2026, 1, 1)}, ValidationError),
        ({"tenant_id": "t", "trace_id": "zz"}, ValidationError), ({"tenant_id": "t", "event_type": 5}, ValidationError),
        ({"tenant_id": "t", "service_id": "\ud800"}, ValidationError),
        ({"tenant_id": "t", "since": datetime(2026, 1, 2, tzinfo=UTC), "until": datetime(2026, 1, 2, tzinfo=UTC)},
         ValidationError),
    ]:  # fmt: skip
        with pytest.raises(error):
            ReplayFilter(**wanted)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"tenant_id": 5}', '{"since": "x"}', '{"other": 1}', "null", "5"])
def test_a_stored_filter_that_is_none(text: str) -> None:
    with pytest.raises(ValidationError):
        ReplayFilter.from_json(text)


def test_settings_that_cannot_be() -> None:
    from soma_common.replay.engine import ReplaySettings

    for given in ({"batch": 0}, {"batch": 10, "page": 5}, {"page": 10_001}, {"lease": 0}):
        with pytest.raises(ConfigurationError):
            ReplaySettings(**given)


def test_modes_are_words() -> None:
    assert [mode.value for mode in ReplayMode] == ["missing", "rebuild", "force"]
