"""PostgreSQL's own command-line tools against a server's address: queries, databases from a template."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit

from soma_common.errors import ServerUnavailable
from soma_common.postgres.binaries import PostgresBinaries, find_binaries

_PATIENCE = 120.0  # seconds for one tool; copying a large template is the slowest


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
        where = self._without_secret(self.at_database(database))
        return self._run("psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", where, "-c", statement)

    def answers(self) -> bool:
        """True when the server takes a query now."""
        return self._try("psql", "-XAtq", "-d", self._server, "-c", "SELECT 1").returncode == 0

    def create_database(self, name: str, *, template: str = "template0") -> str:
        """Make a database as a copy of ``template``; return its DSN."""
        self._run("createdb", "--maintenance-db", self._server, "-T", template, name)
        return self.at_database(name)

    def has_database(self, name: str) -> bool:
        """True when the server has a database of that name."""
        listed = self._run("psql", "-XAtq", "-l", "-F", "\t", "-d", self._server)
        return any(line.split("\t", 1)[0] == name for line in listed.splitlines())

    def drop_database(self, name: str) -> None:
        """Drop a database if it exists, ending the sessions in it."""
        self._run("dropdb", "--maintenance-db", self._server, "--if-exists", "--force", name)

    def at_database(self, name: str | None) -> str:
        """The DSN of another database of the same server."""
        return self.dsn if name is None else urlunsplit(urlsplit(self.dsn)._replace(path=f"/{name}"))

    @property
    def _server(self) -> str:
        return self._without_secret(self.dsn)

    @staticmethod
    def _without_secret(dsn: str) -> str:
        """A command line is for everybody to read; the password goes through the environment."""
        parts = urlsplit(dsn)
        user, at, place = parts.netloc.rpartition("@")
        return urlunsplit(parts._replace(netloc=f"{user.partition(':')[0]}{at}{place}"))

    def _try(self, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        secret = urlsplit(self.dsn).password
        return subprocess.run(
            [self.binaries.path(program), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={**os.environ, "PGCONNECT_TIMEOUT": "10", **({"PGPASSWORD": unquote(secret)} if secret else {})},
            timeout=_PATIENCE,
            check=False,
        )

    def _run(self, program: str, *arguments: str) -> str:
        done = self._try(program, *arguments)
        if done.returncode != 0:
            raise ServerUnavailable(f"{program} failed: {done.stderr.strip()}")
        return done.stdout.strip()
