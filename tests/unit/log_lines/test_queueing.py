"""The handler that does not wait: a slow target, a full queue, the end of the process, forks."""

from __future__ import annotations

import asyncio
import io
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import ConfigurationError
from soma_common.logging.context import log_context
from soma_common.logging.formatters import SomaStackJSONFormatter
from soma_common.logging.queueing import QueueingHandler
from tests.log_support import ROOT, parsed, python, raised, record


class Sink(logging.Handler):
    """A target that writes only while its gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(SomaStackJSONFormatter(service="shop"))
        self.lines: list[str] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        assert self.gate.wait(30)
        self.threads.add(threading.current_thread().name)
        self.lines.append(self.format(record))


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.gate.set()


def messages(sink: Sink) -> list[str]:
    return [parsed(line)["message"] for line in sink.lines]


async def test_an_event_loop_goes_on_while_the_target_is_stuck(sink: Sink) -> None:
    handler = QueueingHandler(sink)
    ticks = 0
    for number in range(500):
        handler.handle(record("%d", number))
        await asyncio.sleep(0)
        ticks += 1
    assert (ticks, sink.lines) == (500, [])
    sink.gate.set()
    handler.close()
    assert messages(sink) == [str(number) for number in range(500)]
    assert sink.threads <= {"soma-logging", "MainThread"}


def test_a_full_queue_drops_counts_and_reports(sink: Sink) -> None:
    handler = QueueingHandler(sink, capacity=10, when_full="drop")
    for number in range(100):
        handler.handle(record("%d", number))
    dropped = handler.dropped
    assert 88 <= dropped <= 90  # the thread holds one
    sink.gate.set()
    assert handler.wait(30)
    handler.close()
    assert [line for line in messages(sink) if line.isdigit()][:10] == [str(number) for number in range(10)]
    reports = [parsed(line) for line in sink.lines if "dropped" in parsed(line)["data"]]
    assert sum(report["data"]["dropped"] for report in reports) == dropped
    assert reports[0]["level"] == "WARNING"
    assert reports[0]["message"] == f"{dropped} log records were dropped: 10 were waiting to be written"
    assert len(sink.lines) == 100 - dropped + len(reports)


def test_a_full_queue_waits_where_that_was_chosen(sink: Sink) -> None:
    handler = QueueingHandler(sink, capacity=3, when_full="block")
    sayer = threading.Thread(target=lambda: [handler.handle(record("%d", number)) for number in range(50)])
    sayer.start()
    sayer.join(0.2)
    assert sayer.is_alive()
    sink.gate.set()
    sayer.join(30)
    handler.close()
    assert (messages(sink), handler.dropped) == ([str(number) for number in range(50)], 0)


def test_a_target_that_logs_does_not_wait_for_itself(sink: Sink) -> None:
    handler = QueueingHandler(sink, capacity=1, when_full="block")
    sink.gate.set()
    plain_emit = sink.emit

    def emit(given: logging.LogRecord) -> None:
        plain_emit(given)
        if "inner" not in given.getMessage():
            for _ in range(5):
                handler.emit(record("inner"))

    sink.emit = emit  # type: ignore[method-assign]
    for _ in range(3):
        handler.handle(record("outer"))
    handler.close()
    assert messages(sink).count("outer") == 3


def test_lines_say_what_was_true_where_they_were_logged(sink: Sink) -> None:
    handler = QueueingHandler(sink)
    changing = {"state": "before"}
    with log_context(tenant_id="acme"):
        handler.handle(record("said %s", changing, data=changing, exc_info=raised(ValueError("no"))))
    changing["state"] = "after"
    sink.gate.set()
    handler.close()
    found = parsed(sink.lines[0])
    assert (found["tenant_id"], found["data"]) == ("acme", {"state": "before"})
    assert found["exception"]["message"] == "no"


def test_many_threads(sink: Sink) -> None:
    handler = QueueingHandler(sink)
    sink.gate.set()
    sayers = [
        threading.Thread(target=lambda n=n: [handler.handle(record("%d-%d", n, m)) for m in range(200)])
        for n in range(8)
    ]
    for sayer in sayers:
        sayer.start()
    for sayer in sayers:
        sayer.join()
    handler.close()
    said = messages(sink)
    assert len(said) == len(set(said)) == 1600
    for n in range(8):
        assert [line for line in said if line.startswith(f"{n}-")] == [f"{n}-{m}" for m in range(200)]


def test_targets_of_the_standard_library(tmp_path: Path) -> None:
    target = RotatingFileHandler(tmp_path / "log", maxBytes=2_000, backupCount=20, encoding="utf-8")
    target.setFormatter(SomaStackJSONFormatter(service="shop"))
    handler = QueueingHandler(target)
    for number in range(50):
        handler.handle(record("%d %%s", number))
    handler.close()
    written = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert {parsed(line)["message"] for line in written} == {f"{number} %s" for number in range(50)}
    assert len(list(tmp_path.iterdir())) > 2


def test_a_target_that_raises_ends_nothing(sink: Sink) -> None:
    class Bad(Sink):
        def handle(self, record: logging.LogRecord) -> bool:
            if len(self.lines) < 1:
                self.lines.append("")
                raise RuntimeError("no")
            return bool(super().handle(record))

    bad = Bad()
    bad.gate.set()
    handler = QueueingHandler(bad)
    for number in range(3):
        handler.handle(record("%d", number))
    handler.close()
    assert [parsed(line)["message"] for line in bad.lines[1:]] == ["1", "2"]


def test_a_target_that_never_ends_is_left_behind_and_it_is_said(sink: Sink, capfd: pytest.CaptureFixture[str]) -> None:
    handler = QueueingHandler(sink, drain=0.05)
    for number in range(5):
        handler.handle(record("%d", number))
    handler.close()
    assert handler.dropped >= 4
    assert "log records were not written within 0.05 s" in capfd.readouterr().err


def test_records_after_the_end_are_written_at_once(sink: Sink) -> None:
    sink.gate.set()
    handler = QueueingHandler(sink)
    handler.handle(record("before"))
    handler.close()
    handler.close()
    handler.handle(record("after"))
    assert messages(sink) == ["before", "after"]


@pytest.mark.parametrize(
    "bad", [{"capacity": 0}, {"when_full": "wait"}, {"drain": 0}, {"drain": float("nan")}], ids=str
)
def test_wrong_bounds_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(bad))}="):
        QueueingHandler(logging.StreamHandler(io.StringIO()), **bad)


START = """
import logging, os, signal, sys, threading, time
from soma_common import configure_logging
configure_logging(service="shop", format="json", stream="stdout", queue=True)
log = logging.getLogger("app")
"""


def said(text: str) -> list[str]:
    return [parsed(line)["message"] for line in text.splitlines()]


@pytest.mark.parametrize("end", ["", "sys.exit(3)", "raise ValueError('no')", "logging.shutdown()"])
def test_the_queue_is_written_at_exit(end: str) -> None:
    done = python(START + f"for n in range(3000):\n    log.info('%d', n)\n{end}")
    assert said(done.stdout) == [str(number) for number in range(3000)]


def test_what_is_said_while_the_interpreter_ends() -> None:
    done = python(START + "import atexit\natexit.register(log.info, 'late')\nlog.info('early')")
    assert said(done.stdout) == ["early", "late"]
    assert not done.stderr


def test_sigterm_that_ends_the_program_well() -> None:
    script = START + (
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
        "for n in range(2000):\n    log.info('%d', n)\n"
        "sys.stderr.write('ready\\n'); sys.stderr.flush()\ntime.sleep(60)"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.append(process.stdout.read()))  # type: ignore[union-attr]
        reader.start()
        assert process.stderr.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        reader.join(30)
        assert process.wait(30) == 0
    assert said(lines[0]) == [str(number) for number in range(2000)]


def test_a_signal_handler_that_logs() -> None:
    """It runs in between any two steps of the logging below it."""
    script = START + (
        "signal.signal(signal.SIGALRM, lambda *_: log.info('signal'))\n"
        "signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)\n"
        "for n in range(5000):\n    log.info('%d', n)\n"
        "signal.setitimer(signal.ITIMER_REAL, 0)"
    )
    done = python(script)
    lines = said(done.stdout)
    assert [line for line in lines if line != "signal"] == [str(number) for number in range(5000)]


@pytest.mark.parametrize("moment", ["made", "started"])
def test_a_signal_handler_that_logs_while_the_thread_begins(
    moment: str, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads would turn the order around, and one of them never end."""
    sink.gate.set()
    handler = QueueingHandler(sink)
    begun: list[threading.Thread] = []

    class Interrupted(threading.Thread):
        def __init__(self, **given: Any) -> None:
            super().__init__(**given)
            self._interrupt("made")

        def start(self) -> None:
            begun.append(self)
            self._interrupt("started")
            super().start()

        def _interrupt(self, now: str) -> None:
            if now == moment and not interrupted:
                interrupted.append(now)
                handler.handle(record("inner"))

    interrupted: list[str] = []
    monkeypatch.setattr("soma_common.logging.queueing.threading.Thread", Interrupted)
    handler.handle(record("outer"))
    handler.close()
    assert len(begun) == 1
    assert not begun[0].is_alive()
    assert messages(sink) == ["inner", "outer"]


def test_a_forked_child_has_a_queue_of_its_own() -> None:
    script = START + (
        "for n in range(500):\n    log.info('parent %d', n)\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    for n in range(500):\n        log.info('child %d', n)\n"
        "    logging.shutdown()\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\nlog.info('parent last')"
    )
    done = python(script, env={"PYTHONWARNINGS": "ignore"})
    lines = said(done.stdout)
    assert [line for line in lines if line.startswith("child")] == [f"child {number}" for number in range(500)]
    assert [line for line in lines if line.startswith("parent")] == [
        *(f"parent {n}" for n in range(500)),
        "parent last",
    ]


def test_forks_while_others_log() -> None:
    """No child hangs on a lock that a thread of its parent held."""
    script = START + (
        "import warnings; warnings.simplefilter('ignore')\n"
        "going = True\n"
        "def chat():\n    while going:\n        log.info('chat')\n        time.sleep(0.0001)\n"
        "threads = [threading.Thread(target=chat) for _ in range(3)]\n"
        "[thread.start() for thread in threads]\n"
        "for n in range(30):\n"
        "    pid = os.fork()\n"
        "    if pid == 0:\n        log.info('child %d', n)\n        logging.shutdown()\n        os._exit(0)\n"
        "    os.waitpid(pid, 0)\n"
        "going = False"
    )
    done = python(script)
    assert done.returncode == 0, done.stderr
    assert sorted(line for line in said(done.stdout) if line.startswith("child")) == sorted(
        f"child {n}" for n in range(30)
    )


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_children_of_multiprocessing(how: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        START + "import multiprocessing, warnings\nwarnings.simplefilter('ignore')\n"
        "def work():\n    for n in range(300):\n        log.info('child %d', n)\n"
        "if __name__ == '__main__':\n"
        f"    process = multiprocessing.get_context('{how}').Process(target=work)\n    process.start()\n    process.join()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert said(done.stdout) == [f"child {number}" for number in range(300)]
