"""Finds ``deployments/`` (the one configuration of every server) in a checkout and in an installed wheel."""

from __future__ import annotations

from pathlib import Path

from soma_common.errors import ServerUnavailable

_IN_WHEEL = Path(__file__).parent / "_deployments"
_IN_CHECKOUT = Path(__file__).parents[2] / "deployments"


def deployments_folder() -> Path:
    """The folder with ``services.yaml``, ``config/`` and ``local/``. Raises ServerUnavailable if it is nowhere."""
    for folder in (_IN_WHEEL, _IN_CHECKOUT):
        if (folder / "config").is_dir():
            return folder
    raise ServerUnavailable(
        "The servers' configuration files are missing from this installation.",
        cure="reinstall soma-common from its wheel, or run from a checkout.",
    )
