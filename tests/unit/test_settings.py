"""No settings object takes a number that it cannot work with: it is refused where it is written, with its bounds."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest

from soma_common.consumer.retries import RetryPolicy
from soma_common.consumer.settings import ConsumerSettings
from soma_common.dlq.careful import RedriveRules
from soma_common.dlq.models import RedrivePolicy
from soma_common.errors import ConfigurationError, SomaError
from soma_common.kafka.member import SourceSettings
from soma_common.kafka.publisher import PublisherSettings
from soma_common.kafka.reader import ReaderSettings
from soma_common.log.source import LogSettings
from soma_common.outbox.settings import RelaySettings
from soma_common.postgres.pool import PoolSettings
from soma_common.replay.engine import ReplaySettings
from soma_common.replay.rebuilding import RebuildSettings
from soma_common.retention.removing import Gently
from soma_common.retention.running import RetentionSettings
from soma_common.retry import Backoff


def _source(**given: Any) -> SourceSettings:
    return SourceSettings(**{"bootstrap": "h:1", "group": "g", "topics": ("t",), **given})


KINDS: dict[Callable[..., Any], type] = {
    _source: SourceSettings,
    lambda **given: PublisherSettings(bootstrap="h:1", **given): PublisherSettings,
    lambda **given: ReaderSettings(bootstrap="h:1", **given): ReaderSettings,
    lambda **given: PoolSettings("postgresql://h/d", **given): PoolSettings,
} | {
    kind: kind
    for kind in (
        ConsumerSettings, RetryPolicy, RedrivePolicy, RedriveRules, Backoff, LogSettings, ReplaySettings, RebuildSettings,
        Gently, RetentionSettings, RelaySettings,
    )
}  # fmt: skip
NUMBERS = [
    pytest.param(make, field.name, field.type, id=f"{kind.__name__}.{field.name}")
    for make, kind in KINDS.items()
    for field in fields(kind)
    if field.type in ("int", "float", "float | None")
]
PARTS = [
    pytest.param(make, field.name, id=f"{kind.__name__}.{field.name}")
    for make, kind in KINDS.items()
    for field in fields(kind)
    if field.type in ("Backoff", "RetryPolicy", "RedrivePolicy", "RebuildSettings", "Gently")
]


@pytest.mark.parametrize("wrong", [-1, math.nan, math.inf, 10**30, "8", [1]])
@pytest.mark.parametrize(("make", "name", "kind"), NUMBERS)
def test_a_number_out_of_bounds_is_refused(make: Callable[..., Any], name: str, kind: str, wrong: Any) -> None:
    with pytest.raises(SomaError) as caught:
        make(**{name: wrong})
    assert caught.value.cure
    assert name in str(caught.value.message)


@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [given for given in NUMBERS if given.values[2] == "int" and not str(given.id).startswith(("Redrive",))],
)
def test_what_is_counted_is_whole(make: Callable[..., Any], name: str, kind: str) -> None:
    for wrong in (2.5, True):
        with pytest.raises(ConfigurationError, match="2.5|True"):
            make(**{name: wrong})


@pytest.mark.parametrize(("make", "name"), PARTS)
def test_a_part_of_another_kind_is_refused(make: Callable[..., Any], name: str) -> None:
    for wrong in (3, None, {"tries": 3}):
        with pytest.raises(ConfigurationError, match=name):
            make(**{name: wrong})


@pytest.mark.parametrize(
    "given", [{"mirror": "soma.dlq"}, {"on_dead_letter": "page"}, {"order": "shard"}, {"unknown": 1}]
)
def test_other_settings_of_a_consumer(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        ConsumerSettings(**given)


def test_one_text_is_no_list_of_topics() -> None:
    with pytest.raises(ConfigurationError, match="no topic"):
        _source(topics="events")
    with pytest.raises(ConfigurationError, match="compression"):
        PublisherSettings(bootstrap="h:1", compression="rar")


@pytest.mark.parametrize("shards", [3, 0, 2048])
def test_shards_are_a_power_of_two(shards: int) -> None:
    with pytest.raises(ConfigurationError):
        LogSettings(shards=shards)
