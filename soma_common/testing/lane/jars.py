"""Downloads a server's jars once per user: Maven fetches what ``pom.xml`` names, SHA-256 sums decide if it is used."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from soma_common.errors import ServerUnavailable
from soma_common.locks import exclusive
from soma_common.testing.deployments import deployments_folder
from soma_common.testing.lane.folders import cache_folder, say

_PLUGIN = "org.apache.maven.plugins:maven-dependency-plugin:3.8.1:copy-dependencies"
_PATIENCE = 1800.0  # seconds another process may need for the same download over a slow line
_STAMP = ".verified"


class Jars:
    """The files of one server (``kafka``, ``apicurio``) in the cache."""

    def __init__(self, server: str, *, recipe: Path | None = None, cache: Path | None = None) -> None:
        self.server = server
        self._recipe = recipe or deployments_folder() / "local" / server
        self._sums = _read_sums(self._recipe / "jars.sha256")
        self._home = (cache or cache_folder()) / "jars"

    def ensure(self, progress: Callable[[str], None] = say) -> Path:
        """The folder with the verified files, downloaded on the first call. Raises ServerUnavailable."""
        target = self._home / f"{self.server}-{_digest_of(self._sums)}"
        if not _complete(target, self._sums):
            self._home.mkdir(parents=True, exist_ok=True)
            with exclusive(self._home / f"{self.server}.lock", within=_PATIENCE):
                if not _complete(target, self._sums):
                    self._download(target, progress)
        return target

    def _download(self, target: Path, progress: Callable[[str], None]) -> None:
        with tempfile.TemporaryDirectory(dir=self._home, prefix=f"{self.server}-partial-") as scratch:
            fresh = Path(scratch) / "files"
            progress(f"{self.server}: fetching {len(self._sums)} files by Maven (once, into {self._home})")
            self._run_maven(fresh, progress)
            _verify(self.server, fresh, self._sums)
            _unpack_archives(fresh)
            (fresh / _STAMP).write_text("".join(f"{digest}  {name}\n" for name, digest in self._sums.items()))
            shutil.rmtree(target, ignore_errors=True)
            fresh.rename(target)
        progress(f"{self.server}: ready")

    def _run_maven(self, fresh: Path, progress: Callable[[str], None]) -> None:
        command = [
            _maven(),
            "-B",
            "-f",
            str(self._recipe / "pom.xml"),
            _PLUGIN,
            f"-DoutputDirectory={fresh}",
        ]
        said: list[str] = []
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as maven:
            for line in maven.stdout or ():
                said.append(line)
                _report(self.server, line, progress)
        if maven.returncode != 0:
            raise ServerUnavailable(
                f"Maven could not fetch the files of {self.server}:\n{''.join(said[-15:])}",
                cure="check the network, or the mirror in ~/.m2/settings.xml.",
            )


def _report(server: str, line: str, progress: Callable[[str], None]) -> None:
    """Pass on Maven's line about a large file; the hundreds about descriptions and sums are left out."""
    if line.startswith("[INFO] Downloaded from") and (".jar (" in line or ".tar.gz (" in line):
        name_and_size = line.split("/")[-1].strip()
        progress(f"{server}: {name_and_size}")


def _maven() -> str:
    maven = shutil.which("mvn")
    if maven is None:
        raise ServerUnavailable(
            "Maven (the program mvn) is missing; it fetches the servers' jars.",
            cure="install it: apt-get install maven, or brew install maven.",
        )
    return maven


def _read_sums(path: Path) -> dict[str, str]:
    pairs = (line.split() for line in path.read_text().splitlines() if line)
    return {name: digest for digest, name in pairs}


def _digest_of(sums: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(sums.items())).encode()).hexdigest()[:12]


def _complete(target: Path, sums: Mapping[str, str]) -> bool:
    return (target / _STAMP).exists() and all((target / name).exists() for name in sums)


def _verify(server: str, folder: Path, sums: Mapping[str, str]) -> None:
    found = {path.name: _sha256(path) for path in folder.iterdir() if path.is_file()}
    wrong = sorted(name for name in found.keys() | sums.keys() if found.get(name) != sums.get(name))
    if wrong:
        raise ServerUnavailable(
            f"The files fetched for {server} differ from jars.sha256: {', '.join(wrong)}.",
            cure="someone changed the files on the way or the pom.xml without its sums; do not use them.",
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unpack_archives(folder: Path) -> None:
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "app", filter="data")
