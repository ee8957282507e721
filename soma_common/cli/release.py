"""Which release this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def release() -> str:
    """The version of the installed distribution; 0 where there is none, as in a checkout that is not installed."""
    try:
        return version("soma-common")
    except PackageNotFoundError:
        return "0"
