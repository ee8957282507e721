"""PostgreSQL's own command-line tools against a server's address: queries, databases from a template."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from urllib.parse import urlsplit, urlunsplit

from soma_common.errors import ServerUnavailable
from soma_common.postgres.binaries import PostgresBinaries, find_binaries


@dataclass(frozen=True, slots=True)
class SqlTools:
    """The tools of one PostgreSQL major, pointed at one server by its DSN."""

    dsn: str
    binaries: PostgresBinaries

    @classmethod
    def at(cls, dsn: str) -> SqlTools:
        return cls(dsn, find_binaries(18))  # version 18's client tools work with every older server

    def query(self, statement: str, *, database: str | None = None) -> str:
        """Run a statement and return its unaligned output. Raises ServerUnavailable with what psql said."""
        return self._run(
            "psql",
            "-XAtq",
            "-v",
            "ON_ERROR_STOP=1",
            "-d",
            self.at_database(database),
            "-c",
            statement,
        )

    def answers(self) -> bool:
        """True when the server takes a query now."""
        command = [
            self.binaries.path("psql"),
            "-XAtq",
            "-d",
            self.dsn,
            "-c",
            "SELECT 1",
        ]
        return subprocess.run(command, capture_output=True, check=False, timeout=30).returncode == 0

    def create_database(self, name: str, *, template: str = "template0") -> str:
        """Make a database as a copy of ``template``; return its DSN."""
        self._run("createdb", "--maintenance-db", self.dsn, "-T", template, name)
        return self.at_database(name)

    def has_database(self, name: str) -> bool:
        """True when the server has a database of that name."""
        listed = self._run("psql", "-XAtq", "-l", "-F", "\t", "-d", self.dsn)
        return any(line.split("\t", 1)[0] == name for line in listed.splitlines())

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, ending the sessions in it."""
        self._run("dropdb", "--maintenance-db", self.dsn, "--if-exists", "--force", name)

    def at_database(self, name: str | None) -> str:
        """The DSN of another database of the same server."""
        return self.dsn if name is None else urlunsplit(urlsplit(self.dsn)._replace(path=f"/{name}"))

    def _run(self, program: str, *arguments: str) -> str:
        command = [self.binaries.path(program), *arguments]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise ServerUnavailable(f"{program} failed: {done.stderr.strip()}")
        return done.stdout.strip()
