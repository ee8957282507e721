"""The door: what is public is there, nothing else is, and importing it loads nothing heavy."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

import soma_common

# Names and paths that the Soma services import (REQUIREMENTS 26.1, DESIGN 11): they never move.
FIXED = {
    "soma_common.decorators": ["trace_transaction"],
    "soma_common.events.types": ["EventType"],
    "soma_common.events.models": ["Event", "RecordedEvent"],
    "soma_common.events.store": ["EventStore"],
    "soma_common.tracing.context": ["TraceContext"],
    "soma_common.tracing.tracer": ["TransactionTracer"],
}
HEAVY = (
    "asyncpg",
    "psycopg",
    "aiokafka",
    "fastavro",
    "rich",
    "httpx",
    "django",
    "opentelemetry.sdk",
    "pydantic",
    "click",
)


def test_every_public_name_can_be_imported_from_the_door() -> None:
    for name in soma_common.__all__:
        assert getattr(soma_common, name) is not None, name


def test_the_door_shows_exactly_its_names() -> None:
    assert set(dir(soma_common)) == {*soma_common.__all__, "__version__"}
    assert len(soma_common.__all__) <= 32


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sagaa'"):
        soma_common.Sagaa  # noqa: B018


@pytest.mark.parametrize("module", FIXED)
def test_fixed_names_live_in_their_fixed_modules(module: str) -> None:
    for name in FIXED[module]:
        found = getattr(importlib.import_module(module), name)
        assert found.__module__ == module
        assert getattr(soma_common, name) is found


def test_importing_the_package_loads_nothing_heavy() -> None:
    script = "import soma_common, sys, json; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert not [name for name in HEAVY if name in loaded]
    assert {name for name in loaded if name.startswith("soma_common")} == {"soma_common"}


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert soma_common.__version__ == version("soma-common")
