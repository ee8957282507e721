"""The environment: is it understood, and as it was meant?"""

from __future__ import annotations

import difflib
import os
import stat
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Final

from soma_common.cli import log_options
from soma_common.cli.checks.findings import Finding, Subject, failed, ok, warn
from soma_common.config import SomaConfig
from soma_common.console.settings import ConsoleSettings
from soma_common.deployment import MODE_VARIABLES, parse_mode
from soma_common.errors import ConfigurationError, SomaError

_PREFIXES: Final = ("SOMA_", "SOMASTACK_")
_CONSOLE: Final = "SOMA_CONSOLE_"
_FILE: Final = "_FILE"
_KEYS: Final = frozenset({"SOMA_CONSOLE_CERTIFICATE_KEY"})  # variables that name files of secrets by themselves
_ASKED: Final = {"SOMA_DEPLOY_MODE": "somastack", "SOMASTACK_POSTGRES_DSN": "postgresql://h/d",
                 "SOMASTACK_KAFKA_BOOTSTRAP": "h:1"}  # fmt: skip
_OTHERS: Final = ("SOMA_TEST_", _CONSOLE, "SOMASTACK_REDIS_", "SOMASTACK_JAEGER_", "SOMASTACK_SOFTWARE_MODE")


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Settings, mode, misspelt variables, files of secrets."""
    env = subject.env
    try:
        config = SomaConfig.from_env(env)
    except SomaError as error:
        yield failed("settings", error)
    else:
        yield ok("settings", f"service {config.service_id}, topic {config.topic}")
    if any(name.startswith(_CONSOLE) for name in env):
        yield _console(env)
    yield _mode(env)
    yield _names(env)
    yield _secrets(env)


def _console(env: Mapping[str, str]) -> Finding:
    try:
        ConsoleSettings.from_env(env)
    except SomaError as error:
        return failed("console", error)
    return ok("console", "its settings are understood")


def _mode(env: Mapping[str, str]) -> Finding:
    given = [(name, env[name]) for name in MODE_VARIABLES if env.get(name)]
    try:
        modes = [parse_mode(value) for _, value in given]
    except ConfigurationError as error:
        return failed("mode", error)
    if not given:
        return ok("mode", "standalone: no variable names another")
    name, value = given[0]
    understood = f"{name}={value} is understood as {modes[0]}"
    if len(set(modes)) > 1:
        others = ", ".join(f"{other}={text}" for other, text in given[1:])
        return warn("mode", f"{understood}; but there is {others}", f"leave {name} only, or let all say the same.")
    return ok("mode", understood)


class _Noting(dict[str, str]):
    """Notes what it is asked for."""

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__(values)
        self.asked: set[str] = set()

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]  # of str only
        self.asked.add(name)
        return super().get(name, default)

    def __contains__(self, name: object) -> bool:
        self.asked.add(str(name))
        return super().__contains__(name)


def known_variables() -> set[str]:
    """Every variable that the library asks for."""
    asked = _Noting(_ASKED)
    SomaConfig.from_env(asked)
    return asked.asked | {*MODE_VARIABLES, log_options.LEVEL, log_options.FORMAT}


def _names(env: Mapping[str, str]) -> Finding:
    known = known_variables()
    strange = sorted(
        name for name in env if name.startswith(_PREFIXES) and name not in known and not name.startswith(_OTHERS)
    )
    if not strange:
        return ok("names", "no variable is misspelt")
    guesses = {name: difflib.get_close_matches(name, known, 1, 0.85) for name in strange}
    told = [f"{name} (is {near[0]} meant?)" if near else name for name, near in guesses.items()]
    if not any(guesses.values()):
        return ok("names", f"not for this library: {', '.join(told)}")
    return warn("names", f"nothing reads {', '.join(told)}", "correct the name, or unset the variable.")


def secret_files() -> set[str]:
    """Every variable that names a file with a secret: those asked for beside the variable that has it itself."""
    console = _Noting({})
    ConsoleSettings.from_env(console)
    asked = known_variables() | console.asked
    return {name for name in asked if name.endswith(_FILE) and name.removesuffix(_FILE) in asked} | _KEYS


def _secrets(env: Mapping[str, str]) -> Finding:
    files = [Path(env[name]) for name in sorted(secret_files()) if env.get(name)]
    open_ones = [str(path) for path in files if _is_open(path)]
    if open_ones:
        return warn("secrets", f"everybody may read {', '.join(open_ones)}", f"chmod 600 {' '.join(open_ones)}")
    return ok("secrets", f"{len(files)} in files" if files else "none in files")


def _is_open(path: Path) -> bool:
    """Whether strangers may read it, or write another one over it."""
    try:
        return bool(os.stat(path).st_mode & (stat.S_IROTH | stat.S_IWOTH))
    except (OSError, ValueError):
        return False
