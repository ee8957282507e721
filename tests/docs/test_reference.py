"""The reference pages say what the code says, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import soma_common
from soma_common import SomaConfig, errors
from soma_common.cli import log_options
from soma_common.cli.main import somastack
from soma_common.console.settings import ConsoleSettings
from soma_common.deployment import ALIASES
from soma_common.events.append import MAX_BATCH
from soma_common.events.keys import MAX_PART_BYTES
from soma_common.events.payloads import MAX_METADATA_BYTES, MAX_PAYLOAD_BYTES
from soma_common.events.types import MAX_TYPE_LENGTH
from soma_common.outbox.groups import GROUPS
from soma_common.testing.backends import ADDRESSES, FORCE

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
ROW = re.compile(r"^\| `(\w+)` \| *([^|]*?) *\|", re.MULTILINE)
SETTINGS = [
    "soma_common.consumer.settings.ConsumerSettings",
    "soma_common.consumer.retries.RetryPolicy",
    "soma_common.dlq.models.RedrivePolicy",
    "soma_common.retry.Backoff",
    "soma_common.log.source.LogSettings",
    "soma_common.kafka.member.SourceSettings",
    "soma_common.kafka.reader.ReaderSettings",
    "soma_common.dlq.mirror.MirrorSettings",
    "soma_common.retention.policy.RetentionPolicy",
    "soma_common.retention.running.RetentionSettings",
    "soma_common.retention.removing.Gently",
    "soma_common.replay.engine.ReplaySettings",
    "soma_common.replay.rebuilding.RebuildSettings",
    "soma_common.outbox.settings.RelaySettings",
    "soma_common.sagas.settings.SagaSettings",
    "soma_common.sagas.steps.UndoPolicy",
    "soma_common.kafka.publisher.PublisherSettings",
    "soma_common.postgres.pool.PoolSettings",
    "soma_common.console.settings.ConsoleSettings",
]


class Recorded(Mapping[str, str]):
    """An environment that remembers what it was asked for."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self.values_, self.asked = values, set[str]()

    def __getitem__(self, name: str) -> str:
        self.asked.add(name)
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


@cache
def page(name: str) -> str:
    return (REFERENCE / f"{name}.md").read_text()


def section(text: str, title: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    found = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[2]


def test_every_variable_of_the_environment_is_described() -> None:
    standalone = Recorded({})
    SomaConfig.from_env(standalone)
    stack = Recorded(
        {
            "SOMA_DEPLOY_MODE": "somastack",
            "SOMASTACK_POSTGRES_DSN": "postgresql://h/d",
            "SOMASTACK_KAFKA_BOOTSTRAP": "h:1",
        }
    )
    SomaConfig.from_env(stack)
    ConsoleSettings.from_env(console := Recorded({}))
    commands = {log_options.LEVEL, log_options.FORMAT}
    tests = {FORCE, *ADDRESSES.values()}
    described = {name for name, _ in ROW.findall(page("configuration")) if name.isupper()}
    assert described == standalone.asked | stack.asked | console.asked | commands | tests


def test_the_defaults_of_the_environment_are_those_of_the_page() -> None:
    defaults = dict(ROW.findall(page("configuration")))
    config = SomaConfig.from_env({})
    assert defaults["SOMA_DEPLOY_MODE"] == f"`{config.mode}`"
    assert defaults["SOMA_SERVICE_ID"] == f"`{config.service_id}`"
    assert defaults["SOMA_FOLDER"] == f"`{config.folder}`"
    assert defaults["SOMA_POOL_SIZE"] == f"`{config.pool_size}`"
    assert defaults["SOMA_TOPIC"] == f"`{config.topic}`".replace(".service.", ".<service>.")
    assert defaults["SOMASTACK_KAFKA_PROTOCOL"] == f"`{config.kafka_security.protocol}`"
    assert defaults["SOMASTACK_KAFKA_MECHANISM"] == f"`{config.kafka_security.mechanism}`"
    assert (config.postgres_pooler, config.exactly_once) == (False, False)


def test_the_aliases_of_modes_are_those_of_the_page() -> None:
    sentence = re.search(r"Modes have aliases.*?\n\n", page("configuration"), re.DOTALL)
    assert sentence is not None
    named = [(re.findall(r"`(\w+)`", part), part) for part in sentence[0].split(";")]
    told = {
        alias: next(mode for mode in set(ALIASES.values()) if mode in part)
        for aliases, part in named
        for alias in aliases
    }
    assert told == ALIASES


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_have_the_defaults_of_the_page(name: str) -> None:
    module, _, kind = name.rpartition(".")
    given = dict(ROW.findall(section(page("configuration"), f"`{name}`")))
    known: dict[str, Any] = {}
    for field in fields(getattr(import_module(module), kind)):
        if field.default is not MISSING:
            known[field.name] = f"`{field.default!r}`"
        elif field.default_factory is not MISSING and field.name != "worker":
            known[field.name] = f"`{field.default_factory()!r}`"
    assert set(given) == set(known) | ({"worker"} if kind == "LogSettings" else set())
    assert {field: _short(known[field]) for field in known} == {field: _full(given[field]) for field in known}


def _short(default: str) -> str:
    """A settings object as its own repr says it; KafkaSecurity() stands for one with defaults, and so does the other."""
    kind = next((kind for kind in ("KafkaSecurity", "RebuildSettings") if default.startswith(f"`{kind}(")), None)
    return f"`{kind}()`" if kind else default


def _full(default: str) -> str:
    from soma_common.consumer.order import Order
    from soma_common.consumer.retries import RetryPolicy
    from soma_common.dlq.mirror import HeaderStyle
    from soma_common.dlq.models import RedrivePolicy
    from soma_common.retention.removing import Gently
    from soma_common.retry import Backoff

    known = {kind.__name__: kind for kind in (Backoff, Gently, HeaderStyle, Order, RedrivePolicy, RetryPolicy)}
    return f"`{eval(default.strip('`'), known)!r}`" if default.startswith(tuple(f"`{name}" for name in known)) else default


def test_the_limits_are_those_of_the_page() -> None:
    limits = section(page("configuration"), "Limits that are not settings")
    values = [int(text.replace(",", "")) for text in re.findall(r"\| ([\d,]+)", limits)]
    assert values == [MAX_BATCH, MAX_PAYLOAD_BYTES, MAX_METADATA_BYTES, MAX_PART_BYTES, MAX_TYPE_LENGTH, 60, GROUPS]


def test_every_error_is_described() -> None:
    classes = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.SomaError)
    }
    described = re.findall(r"^### `(\w+)`", page("errors"), re.MULTILINE)
    assert sorted(described) == sorted(classes)
    for name in described:
        text = section(page("errors"), f"`{name}`")
        assert "**Cause.**" in text, name
        assert "**Cure.**" in text or name in {"SomaError"}, name


def test_the_tree_of_errors_is_the_codes() -> None:
    drawn = re.search(r"SomaError\n.*?\n\n", (errors.__doc__ or "") + "\n\n", re.DOTALL)
    fence = re.search(r"^```text\n(SomaError.*?)^```", page("errors"), re.MULTILINE | re.DOTALL)
    assert drawn is not None
    assert fence is not None
    assert fence[1].split() == drawn[0].split()
    parents: list[str] = []
    for line in fence[1].splitlines():
        name = re.search(r"\w+", line)
        assert name is not None
        depth = (name.start() + 3) // 4
        parents[depth:] = [name[0]]
        if depth:
            assert getattr(errors, name[0]).__bases__ == (getattr(errors, parents[depth - 1]),), name[0]


def test_every_name_of_the_door_is_described() -> None:
    assert re.findall(r"^## `(\w+)", page("api"), re.MULTILINE) == sorted(soma_common.__all__)


def test_every_command_is_described() -> None:
    told = set(re.findall(r"^\$ somastack ([a-z -]*?) ?--help", page("cli"), re.MULTILINE))
    assert told == {""} | set(_commands(somastack))


def _commands(group: Any, before: str = "") -> Iterator[str]:
    import click

    for name in group.list_commands(click.Context(group)):
        command = group.get_command(click.Context(group), name)
        yield f"{before}{name}"
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")
