"""``somastack logs``: what the servers of ``somastack up`` say."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import click

from soma_common.cli.examples import examples
from soma_common.cli.interrupting import interruptible
from soma_common.cli.stack import compose
from soma_common.cli.stack.places import Places, Server, State, effective, mode_of
from soma_common.deployment import DeployMode
from soma_common.errors import ConfigurationError
from soma_common.escaping import plain

_LOOK = 0.2  # seconds between two looks at a file
_BLOCK = 64 * 1024
_MOST = 4 * 1024 * 1024  # bytes of a file's end that are read for its last lines


@click.command(epilog=examples(
    "somastack logs", "the last lines of every server",
    "somastack logs kafka --follow", "what Kafka says from now on too, until Ctrl-C",
))  # fmt: skip
@click.argument("service", required=False, type=click.Choice([server.value for server in Server]))
@click.option("-f", "--follow", is_flag=True, help="Go on with what is said from now on, until Ctrl-C.")
@click.option(
    "-n", "--lines", default=50, show_default=True, type=click.IntRange(0, 100_000), help="Last lines of each."
)
def logs(*, service: str | None, follow: bool, lines: int) -> None:
    """What the servers say that `somastack up` started in SOMA_FOLDER. Of several, each line has the server's name.

    Exit codes: 0 done, 1 there is no such log.
    """
    places = Places.of(os.environ)
    state = places.read()
    if state is not None and state.compose:
        words = ["logs", "--tail", str(lines), *(["--follow"] if follow else []), *([service] if service else [])]
        sys.exit(subprocess.run(compose.command(Path(state.compose), *words), check=False).returncode)
    files = _files(places, state, service)
    tails = [_Tail(path, f"{name:<8} | " if len(files) > 1 else "") for name, path in files.items()]
    for tail in tails:
        tail.last(lines)
    if follow:
        interruptible(lambda: _follow(tails))


def _files(places: Places, state: State | None, service: str | None) -> Mapping[str, Path]:
    mode = state.mode if state is not None else mode_of(effective(os.environ)) or DeployMode.STANDALONE
    wanted = [Server(service)] if service else list(Server)
    paths = {server.value: places.log_of(server, mode) for server in wanted}
    if mode == DeployMode.STANDALONE:
        paths = {name: path for name, path in paths.items() if name == Server.POSTGRES}
    there = {name: path for name, path in paths.items() if path.is_file()}
    if not there:
        raise ConfigurationError(
            f"There is no log of {service or 'any server'} in {places.folder}.",
            cure="`somastack up` starts servers; check SOMA_FOLDER.",
        )
    return there


@dataclass(slots=True)
class _Tail:
    """A file that grows, and may be made anew."""

    path: Path
    before: str
    at: int = 0
    rest: bytes = b""

    def last(self, lines: int) -> None:
        """Tell its last lines; from here on ``more`` goes on."""
        with self._named(), self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _MOST))
            text = file.read(_MOST)
        self.at = size
        found = text.split(b"\n")
        self.rest = found.pop()  # a line that is not at its end
        for line in found[-lines:] if lines else []:
            self._tell(line)

    def more(self) -> None:
        """Tell the lines that came."""
        try:
            for block in self._blocks():
                *lines, self.rest = (self.rest + block).split(b"\n")
                for line in lines:
                    self._tell(line)
        except OSError:
            return  # it is just being made anew
        if len(self.rest) > _BLOCK:
            self._tell(self.rest)
            self.rest = b""

    def _blocks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self.at:
                self.at = 0
            file.seek(self.at)
            while block := file.read(_BLOCK):
                self.at += len(block)
                yield block

    def _tell(self, line: bytes) -> None:
        click.echo(self.before + plain(line.decode("utf-8", "replace").rstrip("\r").replace("\t", "    ")))

    def _named(self) -> _Named:
        return _Named(self.path)


class _Named:
    """An error of reading, as the library's."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise ConfigurationError(
                f"{self._path} cannot be read: {error.strerror}.", cure="run this as the account that ran `up`."
            ) from error


async def _follow(tails: list[_Tail]) -> None:
    while True:
        for tail in tails:
            tail.more()
        sys.stdout.flush()
        await asyncio.sleep(_LOOK)
