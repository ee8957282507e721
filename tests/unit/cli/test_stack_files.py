"""What ``up`` leaves behind, however it looks: nothing in it leads to a foreign process, or to a crash."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from soma_common.cli.stack.environment import exports, write_env
from soma_common.cli.stack.places import Places, Server, Started, State, effective, mode_of
from soma_common.cli.stack.processes import Keeper, end, recorded, runs
from soma_common.errors import ConfigurationError, ServerUnavailable
from soma_common.guard import Identity, Record
from soma_common.locks import exclusive

STATE = State(
    "somastack", (Started("kafka", "4.3.1", "127.0.0.1:1", "/x/server.log"),), {"SOMA_DEPLOY_MODE": "somastack"}
)
WRONG = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'{"mode": "moon", "servers": [], "env": {}}',
    b'{"mode": "k8s", "servers": [1], "env": {}}',
    b'{"mode": "k8s", "servers": 5, "env": {}}',
    b'{"mode": "k8s", "servers": [], "env": []}',
    b"\xff\xfe\x00",
    b"[" * 100_000,
]


def test_a_state_comes_back_as_it_was_and_is_for_its_owner_only(tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.write(STATE)
    assert places.read() == STATE
    assert stat.S_IMODE(places.state_file.stat().st_mode) == 0o600
    places.forget()
    places.forget()
    assert places.read() is None


@pytest.mark.parametrize("content", WRONG)
def test_a_state_that_is_none_is_no_state(content: bytes, tmp_path: Path) -> None:
    places = Places(tmp_path)
    places.state_file.write_bytes(content)
    assert places.read() is None


@pytest.mark.parametrize("content", [*WRONG, b"[0, 1]", b"[1, 5]", b"[-1, null]", b'["x", 1]', b"[99999999999, 1]"])
def test_a_keeper_that_is_none_is_nobody(content: bytes, tmp_path: Path) -> None:
    record = tmp_path / "keeper.json"
    record.write_bytes(content)
    assert Keeper(record).who is None
    assert not Keeper(record).end()


@pytest.mark.parametrize("content", WRONG)
def test_a_record_of_a_server_that_is_none_is_no_server(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "pids.json").write_bytes(content)
    assert recorded(tmp_path / "pids.json") is None
    assert Places(tmp_path).record(Server.POSTGRES, "standalone") is None


def test_a_later_process_of_the_same_id_is_not_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        now = Identity.of(stranger.pid)
        assert now.born is not None
        before = Identity(stranger.pid, now.born - 1)
        assert runs(now)
        assert not runs(before)
        end(before)
        (tmp_path / "keeper.json").write_text(json.dumps([*before]))
        assert not Keeper(tmp_path / "keeper.json").end()
        Record(before, before).write(tmp_path / "pids.json")
        assert Places(tmp_path).record(Server.POSTGRES, "standalone") is None
        assert stranger.poll() is None
        end(now)
        stranger.wait(10)
    assert not runs(now)


def test_a_keeper_holds_locks_until_it_is_ended_and_another_takes_over(tmp_path: Path) -> None:
    keeper, locks = Keeper(tmp_path / "keeper.json"), [tmp_path / "a.lock", tmp_path / "b.lock"]
    keeper.hold(locks[:1])
    first = keeper.who
    assert first is not None
    keeper.hold(locks)
    assert keeper.who not in (None, first)
    assert not runs(first)
    for lock in locks:
        with pytest.raises(TimeoutError), exclusive(lock, within=0.1):
            pass
    assert keeper.end()
    assert not keeper.end()
    for lock in locks:
        with exclusive(lock, within=5.0):
            pass


def test_a_keeper_that_cannot_have_its_lock_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ServerUnavailable, match="cannot be kept"):
        Keeper(tmp_path / "keeper.json").hold([tmp_path / "no" / "such" / "folder.lock"])


def test_one_command_at_a_time(tmp_path: Path) -> None:
    places = Places(tmp_path / "new")
    with places.alone(1.0), pytest.raises(ServerUnavailable, match="at work"), places.alone(0.1):
        pass


def test_a_folder_that_is_a_file_is_an_error_with_a_cure(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be used") as caught, Places(tmp_path / "file").alone(1.0):
        pass
    assert "SOMA_FOLDER" in str(caught.value.cure)


def test_the_environment_says_more_than_what_was_started(tmp_path: Path) -> None:
    Places(tmp_path).write(State("somastack", (), {"SOMA_DEPLOY_MODE": "somastack", "SOMA_POOL_SIZE": "3"}))
    here = {"SOMA_FOLDER": str(tmp_path)}
    assert effective(here)["SOMA_POOL_SIZE"] == "3"
    assert effective(here | {"SOMA_POOL_SIZE": "4"})["SOMA_POOL_SIZE"] == "4"
    assert "SOMA_POOL_SIZE" not in effective(here | {"SOMA_DEPLOY_MODE": "standalone"})
    assert mode_of({"SA01_DEPLOYMENT_MODE": "PROD_DISTRIBUTED"}) == "k8s"


def test_exports_are_safe_in_a_shell() -> None:
    env = {"A": 'it\'s $(touch /tmp/never) `x` "y"\nz', "B": "plain"}
    script = f'{exports(env)}\nprintf "%s|%s" "$A" "$B"'
    assert (
        subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout == f"{env['A']}|plain"
    )


def test_an_env_file_keeps_its_other_lines(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("MINE=1\n")
    path.chmod(0o644)
    write_env(path, {"A": "1", "B": "two words"})
    write_env(path, {"A": "2"})
    lines = path.read_text().splitlines()
    assert lines[0] == "MINE=1"
    assert lines.count("A=2") == 1
    assert not any(line.startswith(("A=1", "B=")) for line in lines)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(ConfigurationError, match="cannot be written"):
        write_env(tmp_path, {})
    assert os.listdir(tmp_path) == [".env"]


@pytest.mark.parametrize("content", [b"{", b"", None])
def test_a_keeper_that_nobody_could_find_any_more_lets_go(content: bytes | None, tmp_path: Path) -> None:
    keeper, lock = Keeper(tmp_path / "keeper.json"), tmp_path / "a.lock"
    keeper.hold([lock])
    if content is None:
        (tmp_path / "keeper.json").unlink()
    else:
        (tmp_path / "keeper.json").write_bytes(content)
    with exclusive(lock, within=20.0):
        pass
