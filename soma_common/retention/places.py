"""From the name of a place to the storage there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from soma_common.errors import ConfigurationError
from soma_common.retention.storage import FolderStorage, Storage


def open_storage(place: str, env: Mapping[str, str]) -> Storage:
    """The storage that a path, a ``file://`` or an ``s3://bucket/prefix`` address names.

    Args:
        env: where the S3 endpoint and credentials stand (docs/how-to/retention.md).

    Raises:
        ConfigurationError: another kind of address, or settings that are missing.
    """
    scheme, found, rest = place.partition("://")
    if scheme == "s3" and found:
        from soma_common.retention.s3 import S3Storage

        return S3Storage(rest, env)
    if found and scheme != "file":
        raise ConfigurationError(f"Archives cannot go to {place!r:.100}.", cure="name a folder, or s3://bucket/path.")
    if not place or "\0" in place:
        raise ConfigurationError("No place is named for archives.", cure="name a folder, or s3://bucket/path.")
    return FolderStorage(Path(rest if found else place).expanduser())
