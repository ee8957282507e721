"""Where archives are kept: one protocol for a folder and for the S3 API."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Protocol

from soma_common.errors import ArchiveUnavailable


class Storage(Protocol):
    """Keeps named bytes. Names are paths of plain words: ``archive/part-00000.avro``. Calls block: use threads.

    Every method raises ArchiveUnavailable when the place is away, full, or not ours to use.
    """

    uri: str

    def write(self, name: str, data: bytes) -> None:
        """Keep new bytes. When this returns they are durable; a name has all of its bytes, or does not exist."""

    def read(self, name: str) -> bytes:
        """The bytes of a name."""

    def names(self, ending: str, below: str = "") -> Sequence[str]:
        """All names with this ending, or those of them in the folder ``below``, in order."""

    def remove(self, name: str) -> None:
        """Forget a name; nothing if there is none."""


class FolderStorage:
    """A folder of this machine, or one that is mounted."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = self.root.as_uri()

    def write(self, name: str, data: bytes) -> None:
        """A temporary file, flushed to the disk, then renamed; then the folders that lead to it."""
        path = self._path(name)
        draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            known = next(folder for folder in path.parents if folder.exists())
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with draft.open("xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                if path.exists():
                    raise FileExistsError(errno.EEXIST, f"{path} is there already")
                draft.rename(path)
            except BaseException:
                with suppress(OSError):
                    draft.unlink(missing_ok=True)
                raise
            self._sync_folders(path, known)
        except OSError as error:
            raise _unavailable(f"{name} cannot be written into {self.root}", error) from error

    def _sync_folders(self, path: Path, known: Path) -> None:
        """Up to the one that holds the root, or to the one that was there already.

        Above the root stands somebody else's folder, which we may not be allowed to read: then nothing was made in it.
        """
        last = min(known, self.root.parent, key=lambda folder: len(folder.parts))
        for folder in path.parents:
            try:
                _sync(folder)
            except PermissionError:
                if folder not in self.root.parents:
                    raise
            if folder == last:
                break

    def read(self, name: str) -> bytes:
        """The whole file."""
        try:
            return self._path(name).read_bytes()
        except OSError as error:
            raise _unavailable(f"{name} cannot be read from {self.root}", error) from error

    def names(self, ending: str, below: str = "") -> Sequence[str]:
        """Temporary files, which begin with a dot, are not among them."""
        start = self._path(below) if below else self.root
        try:
            if not self.root.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, f"{self.root} is no folder")
            found = [path.relative_to(self.root) for path in _files(start)]
        except OSError as error:
            raise _unavailable(f"{self.root} cannot be listed", error) from error
        paths = (str(PurePosixPath(path)) for path in found if not path.name.startswith("."))
        return sorted(path for path in paths if path.endswith(ending))

    def remove(self, name: str) -> None:
        """The file, and its folder when it is empty then."""
        path = self._path(name)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unavailable(f"{name} cannot be removed from {self.root}", error) from error
        with suppress(OSError):
            path.parent.rmdir()

    def _path(self, name: str) -> Path:
        return self.root / checked(name)


def checked(name: str) -> str:
    """A name that stays below the root.

    Raises:
        ArchiveUnavailable: it does not.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise ArchiveUnavailable(f"{name!r:.100} is no name of an archived file.", cure="check the manifest.")
    return name


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder. One that may not be read is an error: rglob would pass over it in silence."""
    for where, _, names in os.walk(folder, onerror=_raise_but_gone):
        yield from (Path(where, name) for name in names)


def _raise_but_gone(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def _sync(folder: Path) -> None:
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def _unavailable(what: str, error: OSError) -> ArchiveUnavailable:
    return ArchiveUnavailable(
        f"{what}: {error.strerror or error}.", cure="check the path, its rights, and the space that is left on it."
    )
