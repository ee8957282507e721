"""What all servers of the lane do alike: start with ports of their own, stop, crash, freeze, go on, end.

A server says what differs: its settings, the files to write before a start, its command and its probe.
"""

from __future__ import annotations

import json
import signal
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

from soma_common.errors import ServerUnavailable
from soma_common.testing.lane.process import Launch, PortTaken, ServerProcess

_DRAWS = 8  # how often a lost race for a port is run again
_NOTE = "settings.json"


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
        file = self.folder / _NOTE
        file.touch(mode=0o600)  # there may be a password in it
        file.write_text(json.dumps(asdict(self._settings)))


def remembered(folder: Path) -> dict[str, Any]:
    """The settings of the server in ``folder``. Raises OSError when the folder is gone."""
    return dict(json.loads((folder / _NOTE).read_text()))
