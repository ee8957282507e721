"""A killed run leaves no server behind, and two runs at once do not meet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from soma_common.guard import Identity, Record
from soma_common.testing.lane.folders import scratch_folder
from soma_common.testing.lane.postgres import PostgresServer
from tests.waiting import wait_until

_RUN = """
import pathlib, time

def test_hold(soma_postgres, soma_kafka):
    where = f"{soma_postgres.folder}\\n{soma_kafka.folder}\\n"
    pathlib.Path(OUT).write_text(where)
    time.sleep(HOLD)
    assert soma_postgres.sql.answers()
"""


@pytest.fixture
def scratch() -> Iterator[Path]:
    folder = scratch_folder("killed")
    yield folder
    subprocess.run(["rm", "-rf", str(folder)], check=True)


def _working_on(folder: Path) -> list[int]:
    """Processes whose command line names the folder, pytest's own excepted."""
    lines = {process.pid: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    return [pid for pid, line in lines.items() if any(str(folder) in word for word in line) and "pytest" not in line]


def _start_run(scratch: Path, name: str, hold: float, *options: str) -> tuple[subprocess.Popen[bytes], Path]:
    """A real pytest run with a temporary folder of its own; it writes its servers' folders into the file."""
    out, home = scratch / f"{name}.out", scratch / name
    home.mkdir()
    home.chmod(0o711)
    test = scratch / f"test_{name}.py"
    test.write_text(f"OUT = {str(out)!r}\nHOLD = {hold}\n{_RUN}")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *_plugin(), *options, str(test)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    env = {**clean, "TMPDIR": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=env, cwd=scratch, stdout=subprocess.DEVNULL), out


def _plugin() -> list[str]:
    """Name the plugin unless the installed package's entry point does."""
    from importlib.metadata import entry_points

    installed = any(point.value == "soma_common.testing.plugin" for point in entry_points(group="pytest11"))
    return [] if installed else ["-p", "soma_common.testing.plugin"]


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_a_killed_pytest_run_leaves_no_server(scratch: Path, options: tuple[str, ...]) -> None:
    run, out = _start_run(scratch, "victim", 600, *options)
    wait_until(lambda: out.exists() and out.read_text().count("\n") == 2)
    folders = [Path(line) for line in out.read_text().splitlines()]
    assert all(_working_on(folder) for folder in folders)
    run.send_signal(signal.SIGKILL)
    run.wait()
    wait_until(lambda: not any(_working_on(folder) or folder.exists() for folder in folders))


def test_two_runs_at_once_do_not_meet(scratch: Path) -> None:
    runs = [_start_run(scratch, name, 1) for name in ("one", "two")]
    assert [run.wait(120) for run, _ in runs] == [0, 0]
    folders = {line for _, out in runs for line in out.read_text().splitlines()}
    assert len(folders) == 4
    assert not any(_working_on(Path(folder)) or Path(folder).exists() for folder in folders)


def test_a_killed_program_without_pytest_leaves_no_server(scratch: Path) -> None:
    program = (
        "import sys, pathlib; from soma_common.testing.lane.postgres import PostgresServer as P; "
        "s = P.start(parent=pathlib.Path(sys.argv[1])); print(s.folder, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(scratch)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        folder = Path(child.stdout.readline().strip())
        assert _working_on(folder)
        child.kill()
    wait_until(lambda: not _working_on(folder) and not folder.exists())


def test_a_killed_guard_takes_its_server_with_it() -> None:
    with PostgresServer.start() as server:
        guard = psutil.Process(server.process.pid).parent()
        assert guard is not None
        guard.kill()
        wait_until(lambda: not server.process.alive)
        record = Record.read(server.folder / "pids.json")
        assert record is not None
        assert record.code is None  # nobody was left to write it down
        assert Identity.of(os.getpid()) == Identity.of(os.getpid()) != Identity(os.getpid(), 1)
        server.start_again()
        assert server.sql.answers()
