"""Programs of Debian that need not be installed: their packages are unpacked once per user, and nothing is set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from soma_common.locks import exclusive
from soma_common.testing.lane.folders import cache_folder

_PATIENCE = 600.0  # seconds for another process to have unpacked the same


def debian_folder(*packages: str) -> Path:
    """The folder into which packages are unpacked; fetched on the first call.

    Raises:
        AssertionError: apt cannot have one; says what apt said.
    """
    home = cache_folder() / "debian"
    home.mkdir(exist_ok=True)
    target = home / "+".join(packages)
    with exclusive(home / "lock", within=_PATIENCE):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=home) as scratch:
                _unpack(packages, Path(scratch))
                (Path(scratch) / "root").rename(target)
    return target


def debian_program(name: str, *packages: str) -> str:
    """A program: as it is installed, else as packages have it."""
    installed = shutil.which(name)
    if installed is not None:
        return installed
    folder = debian_folder(*packages)
    found = [path for place in ("bin", "usr/bin", "usr/sbin") for path in folder.glob(f"{place}/{name}*")]
    assert found, f"{name} is not in {packages}"
    return str(found[0])


def _unpack(packages: tuple[str, ...], folder: Path) -> None:
    os.chmod(folder, 0o755)
    done = subprocess.run(["apt-get", "download", *packages], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"apt-get download {' '.join(packages)}\n{done.stderr}"
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", str(package), str(folder / "root")], check=True)
