"""``somastack saga inspect --watch``."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from typing import Any

import click

from tests.integration.sagas.operating import (
    Ask,
    Run,
    fine,
    finished,
    is_waiting,
    ran,
    started,
    waits,
)
from tests.waiting import wait_until


def watching(env: dict[str, str], saga_id: str, **streams: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "soma_common.cli.main", "saga", "inspect", saga_id, "--watch"],
        env=os.environ | env | {"TERM": "xterm", "PYTHONUNBUFFERED": "1", "COLUMNS": "120", "LINES": "40"}, **streams,
    )  # fmt: skip


def test_watch_in_a_pipe_adds_lines_until_the_end(ask: Ask, run: Run, env: dict[str, str]) -> None:
    saga_id = ran(ask, waits, "1", until=is_waiting)
    process = watching(env, saga_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    first = [process.stdout.readline().decode() for _ in range(3)]
    assert first[0] == f"waits v1 {saga_id}: running\n"
    assert re.fullmatch(r"[\d:.]+Z  ✓  pay  [\d.]+ m?s  7\n", first[1])
    assert re.fullmatch(r"[\d:.]+Z  …  approved  for a signal\n", first[2])
    assert run("signal", saga_id, "approved", "5").exit_code == 0
    finished(ask, saga_id)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    rest = out.decode().splitlines()
    assert re.fullmatch(r"[\d:.]+Z  ✓  approved  5", rest[0])
    assert re.fullmatch(r"[\d:.]+Z  ●  completed after [\d.]+ m?s", rest[1])
    assert len(rest) == 2


def test_ctrl_c_ends_watching_quietly(ask: Ask, env: dict[str, str]) -> None:
    saga_id = started(ask, fine)
    process = watching(env, saga_id, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_watch_on_a_terminal_redraws_and_leaves_the_end(ask: Ask, run: Run, env: dict[str, str]) -> None:
    saga_id = ran(ask, waits, "1", until=is_waiting)
    leader, follower = pty.openpty()
    process = watching(env, saga_id, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)
    os.set_blocking(leader, False)
    shown = bytearray()

    def read(words: bytes) -> bool:
        while True:
            try:
                shown.extend(os.read(leader, 65536) or b"")
            except (BlockingIOError, OSError):
                return words in shown

    wait_until(lambda: read(b"waits at approved"), what="the picture")
    assert "✓".encode() in shown
    assert run("signal", saga_id, "approved", "5").exit_code == 0
    finished(ask, saga_id)
    wait_until(lambda: read(b"") and process.poll() is not None, what="the end")
    os.close(leader)
    assert process.returncode == 0
    end = click.unstyle(shown.decode().rpartition("\x1b[?25h")[2])  # behind the cursor's return
    assert "completed" in end
    assert end.count("approved") == 1
