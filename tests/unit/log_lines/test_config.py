"""Logging set up by one call, by dictConfig, by Django; and what importing the library does to logging: nothing."""

from __future__ import annotations

import io
import logging
from logging.config import dictConfig
from typing import Any

import pytest

from soma_common import configure_logging
from soma_common.errors import ConfigurationError
from soma_common.logging.config import LogQueue
from soma_common.logging.levels import SUCCESS
from soma_common.logging.queueing import QueueingHandler
from soma_common.logging.streams import SomaStackHandler
from tests.log_support import check_console, parsed, python


def test_json_where_no_terminal_is_and_lines_for_people_where_one_is() -> None:
    class Tty(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream, terminal = io.StringIO(), Tty()
    configure_logging(service="shop", stream=stream)
    logging.getLogger("app").info("said")
    assert parsed(stream.getvalue().rstrip("\n"))["logger"] == "app"
    configure_logging(service="shop", stream=terminal, colour=False, emoji=True)
    logging.getLogger("app").info("said")
    check_console(terminal.getvalue().rstrip("\n"))


def test_a_second_call_takes_the_place_of_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    others = len(logging.getLogger().handlers)
    configure_logging(service="shop", stream=first, level="debug")
    configure_logging(service="shop", stream=second, queue=True)
    handler = configure_logging(service="shop", stream=second, level=logging.WARNING)
    logging.getLogger("app").info("no")
    logging.getLogger("app").warning("yes")
    assert first.getvalue() == ""
    assert len(second.getvalue().splitlines()) == 1
    assert len(logging.getLogger().handlers) == others + 1
    assert isinstance(handler, SomaStackHandler)


def test_handlers_of_others_stay_unless_forced() -> None:
    root = logging.getLogger()
    other = logging.NullHandler()
    root.addHandler(other)
    configure_logging(service="shop", stream=io.StringIO())
    assert other in root.handlers
    configure_logging(service="shop", stream=io.StringIO(), force=True)
    assert other not in root.handlers
    assert len(root.handlers) == 1


def test_a_queue_with_its_bounds() -> None:
    stream = io.StringIO()
    handler = configure_logging(service="shop", stream=stream, queue=LogQueue(capacity=5, when_full="block"))
    assert isinstance(handler, QueueingHandler)
    for number in range(50):
        logging.getLogger("app").log(SUCCESS, "%d", number)
    handler.close()
    assert [parsed(line)["level"] for line in stream.getvalue().splitlines()] == ["SUCCESS"] * 50


def test_success_is_a_level_by_name() -> None:
    stream = io.StringIO()
    configure_logging(service="shop", stream=stream, level="SUCCESS")
    logging.getLogger("app").info("no")
    logging.getLogger("app").log(SUCCESS, "yes")
    assert parsed(stream.getvalue().rstrip("\n"))["message"] == "yes"


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ({"level": "LOUD"}, "no level"),
        ({"format": "xml"}, "format is 'xml'"),
        ({"stream": "nowhere"}, "no stream"),
        ({"queue": LogQueue(capacity=0)}, "capacity=0"),
    ],
)
def test_wrong_settings_are_refused_and_change_nothing(bad: dict[str, Any], told: str) -> None:
    before = list(logging.getLogger().handlers)
    with pytest.raises(ConfigurationError, match=told):
        configure_logging(service="shop", **bad)
    assert logging.getLogger().handlers == before


def test_dict_config() -> None:
    stream = io.StringIO()
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "json": {
                    "()": "soma_common.logging.formatters.SomaStackJSONFormatter",
                    "service": "shop",
                    "secrets": ["iban"],
                },
                "bare": {"class": "soma_common.logging.formatters.SomaStackJSONFormatter"},
            },
            "handlers": {
                "out": {"class": "soma_common.logging.streams.SomaStackHandler", "stream": stream, "formatter": "json"},
                "bare": {"class": "logging.StreamHandler", "stream": stream, "formatter": "bare", "level": "SUCCESS"},
            },
            "loggers": {"tests.dict": {"handlers": ["out", "bare"], "level": "INFO", "propagate": False}},
        }
    )
    logging.getLogger("tests.dict").info("said", extra={"iban": "DE00"})
    logging.getLogger("tests.dict").log(SUCCESS, "done")
    first, second, third = map(parsed, stream.getvalue().splitlines())
    assert (first["service"], first["data"]) == ("shop", {"iban": "***"})
    assert (second["message"], third["message"], third["service"]) == ("done", "done", "service")


def test_a_queue_in_dict_config() -> None:
    stream = io.StringIO()
    dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {"json": {"()": "soma_common.logging.formatters.SomaStackJSONFormatter", "service": "shop"}},
            "handlers": {
                "out": {
                    "()": "soma_common.logging.config.queued_handler",
                    "stream": stream,
                    "formatter": "json",
                    "level": "INFO",
                    "capacity": 100,
                }
            },
            "loggers": {"tests.queue": {"handlers": ["out"], "level": "DEBUG", "propagate": False}},
        }
    )
    logger = logging.getLogger("tests.queue")
    logger.debug("no")
    logger.info("said")
    handler = logger.handlers[0]
    assert isinstance(handler, QueueingHandler)
    handler.close()
    assert parsed(stream.getvalue().rstrip("\n"))["message"] == "said"
    with pytest.raises(ConfigurationError, match="writes no records"):
        QueueingHandler({"class": "logging.StreamHandler"})  # type: ignore[arg-type]


DJANGO = """
import django, logging, warnings
from django.conf import settings
settings.configure(
    DEBUG=False, ALLOWED_HOSTS=["testserver"], ROOT_URLCONF=__name__, SECRET_KEY="hunter2Canary",
    LOGGING={
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"FORMAT": {"()": "soma_common.logging.formatters.FORMATTER", "service": "shop"}},
        "handlers": {"out": {"class": "soma_common.logging.streams.SomaStackHandler", "stream": "stdout", "formatter": "FORMAT"}},
        "root": {"handlers": ["out"], "level": "INFO"},
        "loggers": {"django": {"handlers": [], "propagate": True}},
    },
)
from django.urls import path
def fails(request):
    raise RuntimeError("postgresql://app:hunter2Canary@db/shop")
urlpatterns = [path("fails/", fails)]
django.setup()
from django.test import Client
client = Client(raise_request_exception=False)
client.get("/fails/?token=hunter2Canary", headers={"authorization": "Bearer hunter2Canary"})
client.get("/none/%0aevil")
logging.getLogger("shop").info("settings", extra={"settings": {"SECRET_KEY": settings.SECRET_KEY}})
"""


def test_django_with_its_own_records() -> None:
    """Django's records carry the request in their extras."""
    done = python(DJANGO.replace("FORMATTER", "SomaStackJSONFormatter").replace("FORMAT", "json"))
    assert done.returncode == 0, done.stderr
    failed, missing, own = map(parsed, done.stdout.splitlines())
    assert (failed["logger"], failed["level"], failed["data"]["status_code"]) == ("django.request", "ERROR", 500)
    assert failed["exception"]["message"] == "postgresql://app:***@db/shop"
    assert failed["data"]["request"].startswith("<WSGIRequest: GET '/fails/")
    assert (missing["level"], missing["data"]["status_code"]) == ("WARNING", 404)
    assert own["data"] == {"settings": {"SECRET_KEY": "***"}}
    assert "hunter2Canary" not in done.stdout


def test_django_on_a_console() -> None:
    done = python(DJANGO.replace("FORMATTER", "SomaStackFormatter").replace("FORMAT", "console"))
    assert done.returncode == 0, done.stderr
    assert "hunter2Canary" not in done.stdout
    assert len([line for line in done.stdout.splitlines() if not line.startswith("    ")]) == 3


def test_the_library_itself_configures_nothing() -> None:
    script = (
        "import logging, importlib, pkgutil, soma_common\n"
        "before = list(logging.getLogger().handlers), logging.getLogger().level\n"
        "from soma_common import EventStore, Soma, configure_logging\n"
        "assert before == (list(logging.getLogger().handlers), logging.getLogger().level)\n"
        "log = logging.getLogger('soma_common')\n"
        "assert [type(handler).__name__ for handler in log.handlers] == ['NullHandler'], log.handlers\n"
        "logging.getLogger('soma_common.app').warning('nobody asked')\n"
    )
    done = python(script)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
