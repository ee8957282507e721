"""A real server with the S3 API (versitygw), as a process of its own: built once per user by Go, from its pinned module."""

from __future__ import annotations

import secrets
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from soma_common.testing.lane.ports import LOOPBACK, free_port
from tests.go_program import go_program
from tests.waiting import wait_until

VERSION = "v1.8.0"
_MODULE = "github.com/versity/versitygw/cmd/versitygw"


@dataclass
class S3Server:
    """Where it is, who may use it, and the process."""

    endpoint: str
    access_key: str
    secret_key: str
    process: subprocess.Popen[bytes]

    def env(self, **changed: str) -> dict[str, str]:
        """The variables by which clients find it."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
        } | changed


def program() -> Path:
    """The server's program, built on the first call."""
    return go_program(_MODULE, VERSION)


@contextmanager
def s3_server(folder: Path, *buckets: str) -> Iterator[S3Server]:
    """A server with these buckets, on data in a folder."""
    for bucket in buckets:
        (folder / bucket).mkdir(parents=True)
    access, secret, port = "tests", secrets.token_hex(16), free_port()
    command = [str(program()), "--access", access, "--secret", secret, "--port", f"{LOOPBACK}:{port}", "--health",
               "/healthz", "posix", str(folder)]  # fmt: skip
    endpoint = f"http://{LOOPBACK}:{port}"
    with (folder.parent / "s3.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_until(lambda: _answers(f"{endpoint}/healthz"), what="the S3 server")
        yield S3Server(endpoint, access, secret, process)
    finally:
        process.kill()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
