"""The lane's folders: a per-user cache for downloads, and one scratch folder per server."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path


def cache_folder() -> Path:
    """Where downloads are kept between runs: ``$XDG_CACHE_HOME/soma-common``, by default under ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or ""
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"  # the standard ignores relative values
    folder = root / "soma-common"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scratch_folder(name: str, parent: Path | None = None) -> Path:
    """A new folder for one server, under ``parent`` or the system's temporary folder.

    It may be passed through by other accounts (PostgreSQL does not run as root), but not listed.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"soma-{name}-", dir=parent))
    folder.chmod(0o711)
    return folder


def say(text: str) -> None:
    """Progress of something slow, for people: one line on standard error."""
    print(text, file=sys.stderr, flush=True)
