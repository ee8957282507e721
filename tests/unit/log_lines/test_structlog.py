"""structlog beside the standard library: the same lines, whichever of the two said them."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import structlog

from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.processor import SomaStackProcessor
from tests.log_support import check_console, parsed

TRACE = "0af7651916cd43dd8448eb211c80319c"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def said_by_structlog(formatter: logging.Formatter, say: Any) -> str:
    stream = io.StringIO()
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, SomaStackProcessor(formatter)],
        logger_factory=structlog.WriteLoggerFactory(stream),
        cache_logger_on_first_use=False,
    )
    say(structlog.get_logger().bind(logger="app"))
    return stream.getvalue().rstrip("\n")


def said_by_logging(formatter: logging.Formatter, say: Any) -> str:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    logger = logging.Logger("app")
    logger.addHandler(handler)
    say(logger)
    return stream.getvalue().rstrip("\n")


EXTRA = {
    "order": {"id": "o-1", "items": [1, 2]},
    "password": "hunter2",
    "trace_id": TRACE,
    "tenant_id": "acme",
    "category": "AGENT",
}


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_both_write_the_same_json(level: str) -> None:
    formatter = SomaStackJSONFormatter(service="shop")
    one = parsed(said_by_structlog(formatter, lambda log: getattr(log, level)("placed", **EXTRA)))
    other = parsed(said_by_logging(formatter, lambda log: getattr(log, level)("placed", extra=EXTRA)))
    assert {**one, "timestamp": ""} == {**other, "timestamp": ""}


def test_both_write_the_same_line() -> None:
    formatter = SomaStackFormatter(service="shop", emoji=True, colour=False)
    one = check_console(said_by_structlog(formatter, lambda log: log.info("placed", **EXTRA)))
    other = check_console(said_by_logging(formatter, lambda log: log.info("placed", extra=EXTRA)))
    assert one[1:] == other[1:]
    assert one[0][16:] == other[0][16:]


def test_exceptions() -> None:
    def say(log: Any) -> None:
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("failed")

    formatter = SomaStackJSONFormatter(service="shop")
    one, other = parsed(said_by_structlog(formatter, say)), parsed(said_by_logging(formatter, say))
    assert {**one, "timestamp": ""} == {**other, "timestamp": ""}
    assert one["exception"]["type"] == "ValueError"


def test_an_exception_as_value_or_text_or_outside_of_any() -> None:
    formatter = SomaStackJSONFormatter(service="shop")
    one = parsed(said_by_structlog(formatter, lambda log: log.error("failed", exc_info=ValueError("no"))))
    assert one["exception"]["message"] == "no"
    one = parsed(said_by_structlog(formatter, lambda log: log.error("failed", exception="Traceback …")))
    assert one["exception"]["stacktrace"] == "Traceback …"
    assert "exception" not in parsed(said_by_structlog(formatter, lambda log: log.error("failed", exc_info=True)))


def test_keys_that_records_use_themselves() -> None:
    given = {"name": "Ann", "args": [1], "msg": "m", "created": "yesterday", "data": {"a": 1}, "lineno": 7}
    one = parsed(said_by_structlog(SomaStackJSONFormatter(service="shop"), lambda log: log.info("said", **given)))
    assert one["data"] == given
    assert one["logger"] == "app"


def test_context_variables_of_structlog_are_data_and_ids() -> None:
    structlog.contextvars.bind_contextvars(correlation_id="c-1", request="r-1")
    one = parsed(said_by_structlog(SomaStackJSONFormatter(service="shop"), lambda log: log.info("said")))
    assert (one["correlation_id"], one["data"]) == ("c-1", {"request": "r-1"})


def test_the_other_way_round_through_a_handler() -> None:
    """structlog hands its events to the standard library: its keys come as extras."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(SomaStackJSONFormatter(service="shop"))
    logger = logging.getLogger("tests.structlog")
    logger.addHandler(handler)
    logger.propagate = False
    structlog.configure(
        processors=[structlog.stdlib.render_to_log_kwargs], logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger, cache_logger_on_first_use=False,
    )  # fmt: skip
    try:
        structlog.get_logger("tests.structlog").warning("placed", order="o-1")
    finally:
        logger.removeHandler(handler)
    found = parsed(stream.getvalue().rstrip("\n"))
    assert (found["level"], found["message"], found["data"]) == ("WARNING", "placed", {"order": "o-1"})


def test_the_processor_does_not_need_structlog() -> None:
    assert "structlog" not in vars(sys.modules["soma_common.logging.processor"])
