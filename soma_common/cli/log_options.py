"""How commands that stay write their log: ``--log-level`` and ``--log-format``."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Final, cast

import click

from soma_common.logging.config import Format, configure_logging

LEVEL: Final = "SOMA_LOG_LEVEL"
FORMAT: Final = "SOMA_LOG_FORMAT"


@dataclass(frozen=True, slots=True)
class Log:
    """The log of a process, on stderr."""

    level: str
    format: Format

    def start(self, service: str | None = None) -> logging.Handler:
        """Write it from now on; ``service`` (default ``SOMA_SERVICE_ID``) is on each line."""
        # The library tells each change of a connection once; aiokafka tells every attempt.
        logging.getLogger("aiokafka").setLevel(logging.CRITICAL)
        return configure_logging(service=service, level=self.level, format=self.format)

    def rename(self, started: logging.Handler, service: str) -> None:
        """Have ``service`` on each line, unless the application has set its log up in its own way meanwhile."""
        if started in logging.getLogger().handlers:
            self.start(service)


def log_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options, and their values as the argument ``log``."""

    @click.option(
        "--log-level", envvar=LEVEL, default="INFO", show_default=True, show_envvar=True,
        type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"], case_sensitive=False), help="Of its lines on stderr.",
    )  # fmt: skip
    @click.option(
        "--log-format", envvar=FORMAT, default="auto", show_default=True, show_envvar=True,
        type=click.Choice(["auto", "console", "json"]), help="auto: for people on a terminal, JSON elsewhere.",
    )  # fmt: skip
    @wraps(command)
    def run(*args: Any, log_level: str, log_format: str, **options: Any) -> None:
        command(*args, log=Log(log_level, cast("Format", log_format)), **options)

    return run
