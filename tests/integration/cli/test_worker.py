"""``somastack worker`` on the starter project: consumers and sagas as a process, its ends, and what follows the logs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from soma_common.cli.new import write
from tests.cli_support import begun, environment, somastack
from tests.waiting import wait_until

APP = "shop_one.app:soma"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    write(tmp_path / "project", {"name": "shop-one", "package": "shop_one", "version": "0"})
    return tmp_path / "project"


@pytest.fixture
def env(soma_database: str) -> dict[str, str]:
    return {"SOMASTACK_POSTGRES_DSN": soma_database}


def order(project: Path, env: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shop_one"],
        cwd=project,
        env=environment(**env),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "is placed" in done.stdout


def sagas(env: dict[str, str]) -> list[str]:
    done = somastack("saga", "list", "--all-tenants", "--all", "--json", **env)
    assert done.returncode == 0, done.stderr
    return [saga["status"] for saga in _listed(json.loads(done.stdout))]


def _listed(told: object) -> list[dict[str, str]]:
    found = told if isinstance(told, list) else next(value for value in dict(told).values() if isinstance(value, list))  # type: ignore[call-overload]  # JSON
    return list(found)


def sold(soma_postgres: object, env: dict[str, str]) -> str:
    query = soma_postgres.sql.query  # type: ignore[attr-defined]  # whichever backend
    return str(
        query("SELECT coalesce(sum(orders), 0) FROM sales", database=env["SOMASTACK_POSTGRES_DSN"].rpartition("/")[2])
    )


@pytest.fixture
def running(project: Path, env: dict[str, str]) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def test_it_does_the_work_and_drains(
    project: Path, env: dict[str, str], soma_postgres: object, running: list[subprocess.Popen[str]]
) -> None:
    order(project, env)
    assert sagas(env) == ["pending"]
    worker = begun("worker", APP, "--health-port", "0", "--relay", cwd=project, **env)
    running.append(worker)
    wait_until(lambda: sagas(env) == ["completed"] and sold(soma_postgres, env) == "1", what="the work")
    worker.send_signal(signal.SIGTERM)
    said = worker.communicate(timeout=60)[0]
    assert worker.returncode == 0, said
    assert "runs consumer sales, sagas" in said
    assert "no relay in standalone mode" in said
    assert said.rstrip().endswith("drained")


def test_a_part_of_it_alone(
    project: Path, env: dict[str, str], soma_postgres: object, running: list[subprocess.Popen[str]]
) -> None:
    order(project, env)
    worker = begun("worker", APP, "--consumer", "sales", cwd=project, **env)
    running.append(worker)
    wait_until(lambda: sold(soma_postgres, env) == "1", what="the consumer")
    assert sagas(env) == ["pending"]
    worker.send_signal(signal.SIGINT)
    assert "runs consumer sales\n" in worker.communicate(timeout=60)[0]
    assert worker.returncode == 0


def test_probes_tell_how_it_stands(project: Path, env: dict[str, str], running: list[subprocess.Popen[str]]) -> None:
    from soma_common.testing.lane.ports import free_port

    port = free_port()
    running.append(begun("worker", APP, "--health-port", str(port), cwd=project, **env))

    def live() -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=5) as answer:
                return bool(json.load(answer)["ready"])
        except OSError:
            return False

    wait_until(live, what="the probe")


def test_several_applications_and_one_that_a_function_makes(
    project: Path, env: dict[str, str], running: list[subprocess.Popen[str]]
) -> None:
    (project / "both.py").write_text(
        "from shop_one.app import application, soma\nfrom shop_one.settings import settings\nfrom soma_common import Soma\n"
        "other = Soma(settings())\n"
        "@other.handler('order.placed', consumer='mail')\nasync def mail(event, ctx): ...\n"
        "several = [soma, other]\n"
        "def make(): return application(settings())\n"
    )
    for name, words in (
        ("both:several", "runs consumer sales, sagas, consumer mail"),
        ("both:make", "runs consumer sales, sagas"),
    ):
        worker = begun("worker", name, cwd=project, **env)
        running.append(worker)
        assert worker.stdout is not None
        assert worker.stdout.readline().strip() == words
        worker.send_signal(signal.SIGTERM)
        worker.communicate(timeout=60)
        assert worker.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nowhere:soma"], "nowhere"),
        (["shop_one.app:nothing"], "nothing"),
        (["shop_one.app"], "cannot be loaded"),
        (["shop_one.events:MODELS"], "PayloadModels"),
        ([APP, "--consumer", "x\x1b[31m"], "sales"),
        ([APP, "--health-port", "70000"], "70000"),
        (["\x1b[31m:x"], "cannot be loaded"),
    ],
)
def test_what_cannot_run_is_refused(arguments: list[str], word: str, project: Path) -> None:
    done = somastack("worker", *arguments, cwd=project)
    assert done.returncode == 2, done.stderr
    assert word in done.stderr
    assert "\x1b" not in done.stderr


def test_a_module_that_fails_shows_where(project: Path) -> None:
    (project / "bad.py").write_text("1 / 0\n")
    done = somastack("worker", "bad:soma", cwd=project)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


def test_settings_that_cannot_be_read_are_refused(project: Path) -> None:
    done = somastack("worker", APP, cwd=project, SOMA_DEPLOY_MODE="moon")
    assert (done.returncode, "moon" in done.stderr, "Traceback" in done.stderr) == (2, True, False)
