"""What a shell or a file needs to reach the servers that ``up`` started."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from soma_common.errors import ConfigurationError

_BEGIN = "# somastack up: written by the command, read by your programs"
_END = "# somastack up: end"


def exports(env: Mapping[str, str]) -> str:
    """Lines for a shell: ``eval "$(somastack up)"``."""
    return "\n".join(f"export {name}={shlex.quote(value)}" for name, value in env.items())


def write_env(path: Path, env: Mapping[str, str]) -> None:
    """Write the variables into a .env file, readable by its owner only. Other lines of it stay as they are.

    Raises:
        ConfigurationError: it cannot be read or written.
    """
    block = [_BEGIN, *(f"{name}={shlex.quote(value)}" for name, value in env.items()), _END]
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        path.touch(mode=0o600)
        path.chmod(0o600)
        path.write_text("\n".join([*_without_block(lines), *block]) + "\n", encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} cannot be written: {error}.", cure="name another file with --env.") from error


def _without_block(lines: list[str]) -> list[str]:
    if _BEGIN not in lines:
        return lines
    first = lines.index(_BEGIN)
    last = lines.index(_END, first) if _END in lines[first:] else first
    return lines[:first] + lines[last + 1 :]
