"""Debian's Chromium, without installing it: its packages, unpacked once per user into the cache.

Where the machine has a Chromium, or SOMA_TEST_CHROMIUM names one, that one is taken. There is no third way: a test of the
browser that finds none fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, Final

from soma_common.locks import exclusive
from soma_common.testing.lane.folders import cache_folder, say

VARIABLE: Final = "SOMA_TEST_CHROMIUM"
_PACKAGES: Final = ("chromium", "fonts-dejavu-core")
_DONE: Final = "done"
_FLAGS: Final = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")


@cache
def chromium() -> tuple[Path, dict[str, str]]:
    """The program, and the variables that it needs."""
    named = os.environ.get(VARIABLE) or shutil.which("chromium")
    if named:
        return Path(named), {}
    folder = cache_folder() / "chromium"
    folder.mkdir(exist_ok=True)
    with exclusive(folder / "lock", within=600):
        if not (folder / _DONE).exists():
            _unpack(folder)
    root = folder / "root"
    libraries = sorted({str(each.parent) for each in (root / "usr/lib").rglob("*.so*")})
    return root / "usr/lib/chromium/chromium", {"LD_LIBRARY_PATH": ":".join(libraries)}


@asynccontextmanager
async def browser() -> AsyncIterator[Any]:
    """A running Chromium, driven by Playwright."""
    from playwright.async_api import async_playwright

    program, variables = chromium()
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(
            executable_path=str(program), args=list(_FLAGS), env={**os.environ, **variables}
        )  # fmt: skip
        try:
            yield running
        finally:
            await running.close()


def _unpack(folder: Path) -> None:
    """Fetch what this machine lacks of Chromium and what it needs, and unpack it; nothing is installed."""
    say("Fetching Chromium, once: about 120 MB ...")
    for part in ("debs", "root"):
        shutil.rmtree(folder / part, ignore_errors=True)
        (folder / part).mkdir()
    planned = _run("apt-get", "-s", "install", "--no-install-recommends", *_PACKAGES)
    if "Inst chromium " not in planned:
        _run("apt-get", "update")
        planned = _run("apt-get", "-s", "install", "--no-install-recommends", *_PACKAGES)
    names = [line.split()[1] for line in planned.splitlines() if line.startswith("Inst ")]
    _run("apt-get", "-o", "APT::Sandbox::User=root", "download", *names, cwd=folder / "debs")
    for package in (folder / "debs").glob("*.deb"):
        _run("dpkg", "-x", str(package), str(folder / "root"))
    shutil.rmtree(folder / "debs")
    (folder / _DONE).touch()


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, (
        f"{' '.join(command[:3])} … failed; set {VARIABLE} to a Chromium.\n{done.stderr[-2000:]}"
    )
    return done.stdout


if __name__ == "__main__":
    print(*chromium())
