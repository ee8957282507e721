"""``up`` and ``down``: what was started stays, is found again, and nothing else is touched; whatever happens halfway."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path
from uuid import uuid4

import pytest

from soma_common.cli.stack.places import Places, Server
from soma_common.cli.stack.processes import runs
from tests.cli_support import begun, environment, somastack, stack, told
from tests.waiting import wait_until


@pytest.fixture
def folder() -> Path:
    """A short one: the socket of the embedded database is in it."""
    return Path(f"/tmp/soma-cli-{uuid4().hex[:8]}")


@pytest.fixture(autouse=True)
def nothing_is_left(folder: Path) -> object:
    yield
    if folder.exists():
        assert somastack("down", "--volumes", "--yes", SOMA_FOLDER=str(folder)).returncode == 0
        assert {path.name for path in folder.iterdir()} <= {"stack.lock", "users.lock", "start.lock", ".env"}
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()


def in_folder(folder: Path, **env: str) -> dict[str, str]:
    return {"SOMA_FOLDER": str(folder)} | env


def test_the_embedded_database_stays_until_down(folder: Path) -> None:
    env = in_folder(folder)
    assert somastack("status", **env).returncode == 1
    first = somastack("up", **env)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines() == ["export SOMA_DEPLOY_MODE=standalone", f"export SOMA_FOLDER={folder}"]
    assert "migrations applied" in first.stderr
    before = Places(folder).record(Server.POSTGRES, "standalone")
    assert before is not None
    assert "runs already" in somastack("up", **env).stderr
    assert Places(folder).record(Server.POSTGRES, "standalone") == before
    state = told(somastack("status", "--json", **env))
    assert state["up"]
    assert {row["name"]: row["up"] for row in state["components"]} == {
        "postgres": True, "migrations": True, "dead letters": None, "sagas": None, "disk": None,
    }  # fmt: skip
    assert "database system is ready" in somastack("logs", **env).stdout
    assert told(somastack("down", "--json", **env))["done"] == ["postgres: ended"]
    assert not runs(before.server)
    assert somastack("down", **env).stdout == "nothing ran\n"
    assert somastack("status", **env).returncode == 1
    assert "database: up to date" in somastack("up", **env).stderr  # the data stayed


def test_a_shell_knows_what_was_started(folder: Path) -> None:
    script = 'eval "$(somastack up --mode somastack --only postgres)" && somastack db status && somastack down'
    env = environment(SOMA_FOLDER=str(folder), PATH=f"{Path(os.sys.executable).parent}:{os.environ['PATH']}")
    env["SOMASTACK_KAFKA_BOOTSTRAP"] = "127.0.0.1:9"  # nobody asks it
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "0001_event_log" in done.stdout
    assert done.stdout.endswith("postgres: ended\n")


def test_a_database_of_the_lane_keeps_data_port_and_password(folder: Path) -> None:
    with stack(folder, "--mode", "somastack", "--only", "postgres") as first:
        dsn = first["SOMASTACK_POSTGRES_DSN"]
        env = in_folder(folder, SOMASTACK_POSTGRES_DSN=dsn)
        assert somastack("status", SOMA_FOLDER=str(folder)).returncode == 1  # Kafka's address is missing
        assert somastack("db", "status", **env).returncode == 0
        assert somastack("down", SOMA_FOLDER=str(folder)).stdout == "postgres: ended\n"
        assert somastack("db", "status", **env).returncode == 1
        again = somastack(
            "up", "--mode", "somastack", "--only", "postgres", "--env", str(folder / ".env"), SOMA_FOLDER=str(folder)
        )
        assert again.returncode == 0
        assert again.stdout == ""
        assert f"SOMASTACK_POSTGRES_DSN={dsn}" in (folder / ".env").read_text()
        assert "database: up to date" in again.stderr


def test_two_at_once_start_one_server(folder: Path) -> None:
    several = [begun("up", **in_folder(folder)) for _ in range(3)]
    said = [one.communicate(timeout=120)[0] for one in several]
    assert [one.returncode for one in several] == [0, 0, 0], said
    assert sum("runs already" in text for text in said) == 2


def test_down_waits_for_an_up_that_is_at_work(folder: Path) -> None:
    up = begun("up", **in_folder(folder))
    wait_until(lambda: (folder / "stack.lock").exists(), what="up begins")
    down = somastack("down", **in_folder(folder))
    said = up.communicate(timeout=120)[0]
    assert (up.returncode, down.returncode) == (0, 0), said
    if down.stdout != "nothing ran\n":  # it may have come first
        assert somastack("status", **in_folder(folder)).returncode == 1


@pytest.mark.parametrize("arguments", [(), ("--mode", "somastack", "--only", "postgres")], ids=["embedded", "lane"])
@pytest.mark.parametrize("after", [0.35, 0.7, 1.2])
def test_up_that_was_killed_halfway_is_made_good_by_the_next(
    after: float, arguments: tuple[str, ...], folder: Path
) -> None:
    up = begun("up", *arguments, **in_folder(folder))
    time.sleep(after)
    up.send_signal(signal.SIGKILL)
    up.communicate()
    again = somastack("up", "--json", *arguments, **in_folder(folder))
    assert again.returncode == 0, again.stderr
    done = somastack("doctor", "--only", "database", **in_folder(folder, **_standalone(told(again)["env"])))
    assert done.returncode == 0, done.stdout
    assert "postgres: ended" in somastack("down", **in_folder(folder)).stdout


def _standalone(env: dict[str, str]) -> dict[str, str]:
    """The same database without Kafka."""
    return {name: value for name, value in env.items() if name == "SOMASTACK_POSTGRES_DSN"} | {
        "SOMA_DEPLOY_MODE": "standalone"
    }


def test_when_the_keeper_is_killed_the_server_ends_in_good_order_and_the_data_stay(folder: Path) -> None:
    arguments = ("up", "--mode", "somastack", "--only", "postgres")
    assert somastack(*arguments, **in_folder(folder)).returncode == 0
    keeper, record = Places(folder).keeper.who, Places(folder).record(Server.POSTGRES, "somastack")
    assert keeper is not None
    assert record is not None
    os.kill(keeper.pid, signal.SIGKILL)
    wait_until(lambda: not runs(record.guard), what="the guard ends the server")
    assert "database system is shut down" in somastack("logs", "postgres", **in_folder(folder)).stdout
    assert "database: up to date" in somastack(*arguments, **in_folder(folder)).stderr


@pytest.mark.parametrize("content", [b"{", b"\xff\x00", b'{"mode": "moon"}'])
def test_files_that_are_damaged_do_no_harm(content: bytes, folder: Path) -> None:
    assert somastack("up", **in_folder(folder)).returncode == 0
    (folder / "stack.json").write_bytes(content)
    assert somastack("status", **in_folder(folder)).returncode == 0
    assert "runs already" in somastack("up", **in_folder(folder)).stderr
    (folder / "keeper.json").write_bytes(content)
    assert somastack("up", **in_folder(folder)).returncode == 0
    assert somastack("down", **in_folder(folder)).returncode == 0


def test_settings_of_a_server_that_are_damaged_are_not_overwritten(folder: Path) -> None:
    arguments = ("up", "--mode", "somastack", "--only", "postgres")
    assert somastack(*arguments, **in_folder(folder)).returncode == 0
    assert somastack("down", **in_folder(folder)).returncode == 0
    settings = folder / "stack" / "postgres" / "settings.json"
    for content in ("{", "[1]", '{"port": 1}'):
        settings.write_text(content)
        done = somastack(*arguments, **in_folder(folder))
        assert done.returncode == 1
        assert "down --volumes" in done.stderr, done.stderr
    assert (folder / "stack" / "postgres" / "data" / "PG_VERSION").exists()


def test_a_port_that_somebody_has(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = somastack(
            "up", "--mode", "somastack", "--only", "postgres", "--port", f"postgres={port}", **in_folder(folder)
        )
        assert done.returncode == 1
        assert f"Port {port} is taken" in done.stderr
    done = somastack(
        "up", "--json", "--mode", "somastack", "--only", "postgres", "--port", f"postgres={port}", **in_folder(folder)
    )
    assert told(done)["servers"][0]["address"] == f"127.0.0.1:{port}"


def test_the_modes_do_not_mix(folder: Path) -> None:
    assert somastack("up", **in_folder(folder)).returncode == 0
    done = somastack("up", "--mode", "somastack", "--only", "postgres", **in_folder(folder))
    assert done.returncode == 1
    assert "somastack down" in done.stderr


def test_other_users_of_the_embedded_database_keep_it(folder: Path) -> None:
    from soma_common.postgres.embedded import EmbeddedPostgres

    assert somastack("up", **in_folder(folder)).returncode == 0
    with EmbeddedPostgres(folder) as embedded:
        done = somastack("down", **in_folder(folder))
        assert "other programs use it" in done.stdout
        refused = somastack("down", "--volumes", "--yes", **in_folder(folder))
        assert refused.returncode == 1
        assert "Programs use" in refused.stderr
        assert embedded.runs
    wait_until(lambda: not embedded.runs, what="the last user leaves")


def test_data_are_deleted_when_somebody_says_so(folder: Path) -> None:
    assert somastack("up", **in_folder(folder)).returncode == 0
    (folder / "mine.txt").write_text("kept")
    for answer in ("n\n", ""):
        assert somastack("down", "--volumes", given=answer, **in_folder(folder)).returncode == 1
    assert (folder / "data").exists()
    done = somastack("down", "--volumes", given="y\n", **in_folder(folder))
    assert "data deleted" in done.stdout
    assert not (folder / "data").exists()
    assert (folder / "mine.txt").read_text() == "kept"
    (folder / "mine.txt").unlink()


def test_kubernetes_is_not_pretended(folder: Path) -> None:
    done = somastack("up", "--mode", "k8s", **in_folder(folder))
    assert (done.returncode, done.stdout) == (2, "")
    assert "no Helm chart" in done.stderr
    assert not folder.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--only", "moon"),
        ("--only", ""),
        ("--only", "kafka"),
        ("--port", "kafka"),
        ("--port", "kafka=0"),
        ("--port", "x=1"),
        ("--mode", "mars"),
    ],
)
def test_what_cannot_be_meant_is_refused(arguments: tuple[str, ...], folder: Path) -> None:
    done = somastack("up", *arguments, **in_folder(folder))
    assert done.returncode == 2, done.stderr
    assert not folder.exists()


def test_without_the_extra_it_says_which(folder: Path) -> None:
    hidden = "import sys; sys.modules['psutil'] = None; from soma_common.cli.main import main; main(sys.argv[1:])"
    hidden = hidden.replace(
        "sys.modules['psutil'] = None",
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *a: None if n == 'psutil' else f(n, *a)",
    )
    done = subprocess.run(
        [os.sys.executable, "-c", hidden, "up", "--mode", "somastack"], env=environment(SOMA_FOLDER=str(folder)),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "psutil" in done.stderr
    assert "soma-common[testing]" in done.stderr


def test_compose_where_there_is_none(folder: Path) -> None:
    done = somastack("up", "--mode", "somastack", "--backend", "compose", **in_folder(folder))
    assert done.returncode == 1
    assert "--backend compose cannot be used" in done.stderr
    assert json.dumps([path.name for path in folder.iterdir()]) == '["stack.lock"]'
