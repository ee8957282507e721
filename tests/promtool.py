"""The real promtool: from Debian's ``prometheus`` package, unpacked once per user; nothing is installed."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from soma_common.errors import ServerUnavailable
from soma_common.locks import exclusive
from soma_common.testing.lane.folders import cache_folder, say

_PACKAGE = "prometheus"


def promtool() -> Path:
    """The program: the system's if there is one, else the package's."""
    known = shutil.which("promtool")
    if known is not None:
        return Path(known)
    folder = cache_folder() / _PACKAGE
    found = folder / "promtool"
    if not found.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / "lock", within=600):
            if not found.exists():
                say("Fetching Debian's prometheus package for promtool, once.")
                _unpack(folder)
    return found


def _unpack(folder: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise ServerUnavailable(f"promtool and {tool} are missing.", cure="install Prometheus.")
    with tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True) as scratch:
        command = ["apt-get", "download", "--quiet", _PACKAGE]
        if subprocess.run(command, cwd=scratch, capture_output=True).returncode != 0:  # perhaps its lists are missing
            subprocess.run(["apt-get", "update", "--quiet"], capture_output=True, check=False)
            subprocess.run(command, cwd=scratch, check=True)
        (package,) = Path(scratch).glob("*.deb")
        subprocess.run(["dpkg-deb", "-x", package, f"{scratch}/tree"], check=True)
        (Path(scratch) / "tree/usr/bin/promtool").rename(folder / "promtool")


def run(*arguments: str | Path, given: str | None = None, cwd: Path | None = None) -> str:
    """What it says; it must be content."""
    done = subprocess.run(
        [promtool(), *map(str, arguments)], input=given, cwd=cwd, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
