"""The page about log lines says what the code does: fields, markers, settings, and a test for each row of the table."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from soma_common.logging.config import LogQueue, configure_logging
from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.markers import CATEGORIES, LEVELS
from soma_common.logging.secrets import NAMES
from tests.log_support import FIELDS, OPTIONAL

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "logging.md").read_text()
TESTS = ROOT / "tests" / "unit" / "log_lines"


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found is not None, title
    return found[1]


def rows(title: str) -> list[list[str]]:
    lines = [line for line in section(title).splitlines() if line.startswith("| `")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split(" | ")] for line in lines]


def test_the_fields_are_those_of_every_line() -> None:
    told = {name: when for name, when, _ in rows("A line of JSON")}
    assert tuple(name for name, when in told.items() if when == "always") == FIELDS
    assert {name for name, when in told.items() if when != "always"} == OPTIONAL


def test_the_markers_are_the_codes() -> None:
    import logging

    known = {logging.getLevelName(level): tuple(mark) for level, mark in LEVELS.items()}
    known |= {name: tuple(mark) for name, mark in CATEGORIES.items()}
    assert {name: (emoji, plain) for name, emoji, plain in rows("Markers")} == known


def test_the_settings_are_the_codes() -> None:
    told = {name: default for name, default, _ in rows("`configure_logging`")}
    known = {name: repr(given.default) for name, given in inspect.signature(configure_logging).parameters.items()}
    assert told == known
    told = {name: default for name, default, _ in rows("`LogQueue`")}
    assert told == {field.name: repr(field.default) for field in fields(LogQueue)}


@pytest.mark.parametrize(
    ("kind", "name", "told"),
    [
        (SomaStackJSONFormatter, "limit", "at most `limit` bytes (16,000"),
        (SomaStackFormatter, "limit", "cut at `limit` (500) characters"),
        (SomaStackFormatter, "text_limit", "at `text_limit` (16,000)"),
    ],
)
def test_the_limits_are_the_codes(kind: Any, name: str, told: str) -> None:
    assert told in re.sub(r"\s+", " ", PAGE)
    assert f"{inspect.signature(kind).parameters[name].default:,}" in told


def test_the_names_of_secrets_are_the_codes() -> None:
    told = section("Secrets").partition("By the name of a field")[2].partition("more by")[0].partition("):")[2]
    assert tuple(re.findall(r"`([^`]+)`", told)) == NAMES


def test_each_row_of_the_hostile_table_names_tests_that_exist() -> None:
    table = [line for line in section("Hostile records").splitlines() if line.startswith("| ")][1:]
    assert len(table) >= 30
    for row in table:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, test in named:
            assert re.search(rf"^(async )?def {test}\(", (TESTS / file).read_text(), re.MULTILINE), f"{file}::{test}"
