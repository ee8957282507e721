"""What all servers of the lane do alike: start with ports of their own, stop, crash, freeze, go on, end.

A server says what differs: its settings, the files to write before a start, its command and its probe.
"""

from __future__ import annotations

import json
import secrets
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from soma_common.errors import ServerUnavailable
from soma_common.testing.lane.process import LASTING, Launch, PortTaken, ServerProcess

_DRAWS = 8  # how often a lost race for a port is run again
_NOTE = "settings.json"
_MAKING = "making-"
_LOST = "`somastack down --volumes` deletes the data; a new server is made then."


@dataclass(frozen=True, slots=True)
class Settings(ABC):
    """What another process needs to attach to a server: plain values, the ports among them."""

    @abstractmethod
    def redrawn(self) -> Self:
        """The same with other ports."""


S = TypeVar("S", bound=Settings)


class LaneServer(ABC, Generic[S]):
    """A server of our own in a folder of its own: made with ``start`` or ``attach``; a context manager."""

    _grace: ClassVar[float] = 20.0  # seconds of an orderly end before SIGKILL

    def __init__(self, name: str, folder: Path, settings: S) -> None:
        self.process = ServerProcess(name, folder)
        self._settings = settings

    @property
    def folder(self) -> Path:
        return self.process.folder

    @property
    def log_path(self) -> Path:
        return self.process.log_path

    @property
    @abstractmethod
    def address(self) -> str:
        """Host and port."""

    def start_again(self, *, within: float = 120.0) -> None:
        """Start the stopped or killed server on the same data and ports; wait until it is ready."""
        self.process.start(self._launch(within))

    def serve(self, *, drawn: bool = True, within: float = 120.0) -> bool:
        """Of a server that lasts: wait until it is ready, and start it where it does not run; whether it was started.

        ``drawn``: its ports are nobody's wish, and are drawn again when another program has taken one.

        Raises ServerUnavailable with the end of its log; its data stay.
        """
        if self.process.alive:
            self.process.wait(self._launch(within))
            return False
        for _ in range(_DRAWS):
            try:
                self._prepare()
                self._remember()
                self.start_again(within=within)
            except PortTaken:
                if not drawn:
                    raise
                self._settings = self._settings.redrawn()
            else:
                return True
        raise ServerUnavailable(f"Lost the race for a port {_DRAWS} times.", cure="try again.")

    def stop(self) -> None:
        """An orderly end (SIGTERM), then SIGKILL after a bound; the data stay."""
        self.process.end(signal.SIGTERM, within=self._grace)

    def restart(self) -> None:
        """Stop in an orderly way and start again."""
        self.stop()
        self.start_again()

    def kill(self) -> None:
        """SIGKILL every process of the server."""
        self.process.kill()

    def pause(self) -> None:
        """SIGSTOP every process of the server."""
        self.process.pause()

    def resume(self) -> None:
        """SIGCONT every process of the server."""
        self.process.resume()

    def close(self) -> None:
        """End the server and delete its folder."""
        self.process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @abstractmethod
    def _prepare(self) -> None:
        """Write what the server reads when it starts. Called again when its ports had to be drawn again."""

    @abstractmethod
    def _launch(self, within: float) -> Launch:
        """The command and the probe."""

    def _start_first(self) -> Self:
        """Start for the first time; whoever loses the race for a port draws again. A failure leaves only the log."""
        for _ in range(_DRAWS):
            try:
                self._prepare()
                self._remember()
                self.start_again()
            except PortTaken:
                self._settings = self._settings.redrawn()
            except BaseException:
                self.process.abandon()
                raise
            else:
                return self
        self.close()
        raise ServerUnavailable(f"Lost the race for a port {_DRAWS} times.", cure="try again.")

    def _remember(self) -> None:
        fresh = self.folder / f"{_NOTE}.new"
        fresh.unlink(missing_ok=True)
        fresh.touch(mode=0o600)  # there may be a password in it
        fresh.write_text(json.dumps(asdict(self._settings)))
        fresh.replace(self.folder / _NOTE)


def making_folder(folder: Path, *, mode: int = 0o755) -> Path:
    """A new folder in which a server's data are made, to be renamed when they are whole.

    A name of its own each time: where a starter was killed, its tool may still be at work in the old one.
    """
    for old in folder.glob(f"{_MAKING}*"):
        shutil.rmtree(old, ignore_errors=True)
    fresh = folder / f"{_MAKING}{secrets.token_hex(4)}"
    fresh.mkdir(mode=mode)
    return fresh


@contextmanager
def made_once(folder: Path) -> Iterator[dict[str, Any] | None]:
    """The settings of the server in a folder that lasts, or None where it is to be made in this block.

    What was left half made by a process that was killed is made anew.

    Raises ServerUnavailable: the settings cannot be read, and there are data.
    """
    folder.mkdir(mode=0o711, parents=True, exist_ok=True)
    (folder / LASTING).touch()
    making = folder / "making"
    if making.exists():
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / _NOTE).unlink(missing_ok=True)
    try:
        known = remembered(folder)
    except FileNotFoundError:
        known = None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ServerUnavailable(f"The settings in {folder} cannot be read: {error}.", cure=_LOST) from error
    if known is None and (folder / "data").exists():
        raise ServerUnavailable(f"There are data in {folder}, and their server's settings are gone.", cure=_LOST)
    if known is None:
        making.touch()
    try:
        yield known
    except TypeError as error:  # settings of another release, or of somebody's hand
        raise ServerUnavailable(
            f"The settings in {folder} are not those of this server: {error}.", cure=_LOST
        ) from error
    making.unlink(missing_ok=True)


def remembered(folder: Path) -> dict[str, Any]:
    """The settings of the server in ``folder``. Raises OSError when the folder is gone."""
    return dict(json.loads((folder / _NOTE).read_text()))
