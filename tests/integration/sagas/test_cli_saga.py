"""``somastack saga`` as an operator runs it."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import click
import pytest
from click.testing import CliRunner, Result

from soma_common import Soma, SomaConfig
from soma_common.cli.main import somastack
from soma_common.cli.saga import saga
from soma_common.errors import StepRefused
from soma_common.retry import Backoff
from soma_common.sagas.models import (
    Saga,
    SagaContext,
    SagaStatus,
    SagaStep,
    Signal,
    Timer,
    UndoPolicy,
    Unknown,
    with_compensation,
)
from soma_common.sagas.views import SagaView
from tests.saga_support import Sagas, opened, told
from tests.waiting import wait_until

Ask = Callable[[Callable[[Sagas], Awaitable[Any]]], Any]
Run = Callable[..., Result]
SOON = Backoff(base=0.001, maximum=0.01)
HOSTILE = "\x1b[2J\x9b2J\x1b]0;t\x07\n\u202eCure:  rm"
NOBODY = "00000000-0000-7000-8000-000000000000"


async def hold(order: str) -> list[str]:
    return [f"held {order}"]


async def cannot(order: str, held: list[str]) -> None:
    raise ConnectionError(HOSTILE if order == "hostile" else f"cannot undo {order}")


@with_compensation(cannot)
async def reserve(order: str) -> list[str]:
    return [f"held {order}"]


async def pay(order: str, ctx: SagaContext) -> int:
    if order == "refuse":
        raise StepRefused("no money")
    if order == "hostile":
        raise StepRefused(HOSTILE)
    if order == "flaky" and ctx.attempt < 6:
        raise ConnectionError(f"try {ctx.attempt}")
    return 7


async def charge(order: str) -> int:
    await asyncio.sleep(5.0)
    return 1


undoable = SagaStep(reserve, undo=UndoPolicy(max_retries=1, retry=SOON))
fine = Saga("place-order", str, hold, SagaStep(pay, max_retries=9, retry=SOON), version=3)
bad = Saga("bad-undo", str, undoable, pay)
doubt = Saga("doubt", str, undoable, SagaStep(charge, timeout_seconds=0.05, unknown=Unknown.ASK))
waits = Saga("waits", str, SagaStep(pay), Signal("approved", int))
sleeps = Saga("sleeps", str, SagaStep(pay), Timer("night", 3600))
ALL = (fine, bad, doubt, waits, sleeps)


@pytest.fixture
def ask(soma_database: str) -> Ask:
    """Runs something with sagas, in a loop of its own: the commands have theirs."""

    async def with_sagas(work: Callable[[Sagas], Awaitable[Any]]) -> Any:
        async with opened(soma_database, *ALL) as sagas:
            return await work(sagas)

    return lambda work: asyncio.run(with_sagas(work))


@pytest.fixture
def env(soma_database: str) -> dict[str, str]:
    return {
        "SOMA_DEPLOY_MODE": "somastack",
        "SOMASTACK_POSTGRES_DSN": soma_database,
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9",
    }


@pytest.fixture
def run(env: dict[str, str]) -> Run:
    return lambda *arguments, **more: CliRunner().invoke(saga, list(arguments), env=env, color=True, **more)


def ran(ask: Ask, definition: Saga, given: str, *, until: Callable[[SagaView], bool] | None = None) -> str:
    """The id of a saga that a worker brought to its end, or so far."""

    async def work(sagas: Sagas) -> str:
        saga_id = await sagas.start(definition, given)
        async with sagas.worker():
            if until is None:
                await sagas.ended(saga_id)
            else:
                while not until(await sagas.orchestrator.get_saga(saga_id)):
                    await asyncio.sleep(0.01)
        return str(saga_id)

    found: str = ask(work)
    return found


def is_waiting(view: SagaView) -> bool:
    return view.last_what == "waiting" and not view.has_worker


def started(ask: Ask, definition: Saga, given: str = "1", **more: Any) -> str:
    """The id of a saga that no worker has seen."""
    return str(ask(lambda sagas: sagas.start(definition, given, **more)))


def view_of(ask: Ask, saga_id: str) -> SagaView:
    found: SagaView = ask(lambda sagas: sagas.orchestrator.get_saga(saga_id))
    return found


def journal_of(run: Run, saga_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("inspect", saga_id, "--json").output)["journal"]
    return found


def finished(ask: Ask, saga_id: str) -> SagaView:
    """The saga after a worker had it."""

    async def work(sagas: Sagas) -> SagaView:
        async with sagas.worker():
            return await sagas.ended(UUID(saga_id))

    found: SagaView = ask(work)
    return found


def assert_harmless(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text), text


def test_list_shows_what_is_active(ask: Ask, run: Run) -> None:
    ended, stuck = ran(ask, fine, "1"), ran(ask, bad, "refuse")
    waiting, sleeping = ran(ask, waits, "1", until=is_waiting), ran(ask, sleeps, "1", until=is_waiting)
    new = started(ask, Saga("place-order", str, pay, version=8))
    done = run("list", "--tenant", "shop")
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line for line in done.output.splitlines()}
    assert ended not in rows
    assert "place-order v8" in rows[new]
    assert "waits for a worker with version 8" in rows[new]
    assert re.search(r"bad-undo v1 +stuck +at reserve +\d+ s +.*ConnectionError: cannot undo refuse", rows[stuck])
    assert "waits at approved, due in 5 min" in rows[waiting]  # its deadline
    assert "waits at night" in rows[sleeping]
    assert list(rows)[1:] == [new, sleeping, waiting, stuck]
    every = run("list", "--all-tenants", "--all")
    assert re.search(rf"{ended} +place-order v3 +completed", every.output)
    assert run("list", "--tenant", "nobody").output.split() == [
        "saga",
        "name",
        "status",
        "where",
        "age",
        "error",
        "tenant",
        "correlation",
    ]


def test_list_filters_and_pages(ask: Ask, run: Run) -> None:
    ids = [started(ask, fine, correlation_id="c1"), started(ask, waits, saga_key="k"), started(ask, fine)]

    def found(*options: str) -> list[str]:
        done = run("list", "--tenant", "shop", "--json", *options)
        assert done.exit_code == 0, done.output
        return [each["saga_id"] for each in json.loads(done.output)["sagas"]]

    assert found() == ids[::-1]
    assert found("--name", "place-order") == [ids[2], ids[0]]
    assert found("--correlation-id", "c1") == [ids[0]]
    assert found("--key", "k") == [ids[1]]
    assert found("--status", "pending", "--status", "stuck") == ids[::-1]
    assert found("--status", "completed") == []
    assert found("--since", f"{datetime.now(UTC) + timedelta(hours=1):%Y-%m-%dT%H:%M:%S}") == []
    assert found("--until", f"{datetime.now(UTC) - timedelta(hours=1):%Y-%m-%dT%H:%M:%S%z}") == []
    first = run("list", "--tenant", "shop", "--limit", "2")
    cursor = first.output.split("more: --cursor ")[1].strip()
    assert found("--cursor", cursor) == [ids[0]]
    assert json.loads(run("list", "--tenant", "shop", "--limit", "2", "--json").output)["next_cursor"] == cursor


def test_inspect_tells_what_happened(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, fine, "flaky")
    done = run("inspect", saga_id)
    assert done.exit_code == 0, done.output
    text = done.output
    for words in (saga_id, "place-order v3", "completed", "shop", '"flaky"', "priority", "result", "trace"):
        assert words in text
    lines = [line.strip() for line in text[text.index("✓") :].splitlines()]
    assert re.fullmatch(r'✓ +[\d:.]+ +hold +[\d.]+ m?s +\["held flaky"\]', lines[0]), lines[0]
    assert re.fullmatch(r"✓ +[\d:.]+ +pay +try 6 +[\d.]+ m?s +7", lines[1]), lines[1]
    assert re.fullmatch(r"try 1 after [\d.]+ m?s: ConnectionError: try 1", lines[2])
    assert lines[3] == "... 3 more"
    assert re.fullmatch(r"try 5 after [\d.]+ m?s: ConnectionError: try 5", lines[4])
    assert re.fullmatch(r"● +[\d:.]+ +completed", lines[5])
    assert "somastack saga" not in text


def test_inspect_as_json_has_everything(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, bad, "refuse")
    shown = json.loads(run("inspect", saga_id, "--json").output)
    assert (shown["saga_id"], shown["status"], shown["input"]) == (saga_id, "stuck", "refuse")
    assert datetime.fromisoformat(shown["created_at"]).tzinfo is not None
    whats = [(entry["what"], entry["step"]) for entry in shown["journal"]]
    assert whats == [
        ("done", "reserve"), ("failed", "pay"), ("turned", ""), ("undo-retrying", "reserve"),
        ("undo-failed", "reserve"), ("stuck", ""),
    ]  # fmt: skip
    assert "StepRefused: no money" in shown["journal"][1]["stack"]


def test_inspect_names_the_step_and_what_can_help(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, bad, "refuse")
    text = run("inspect", saga_id).output
    assert "It is stuck at reserve." in text
    assert re.search(r"✗ +[\d:.]+ +pay +[\d.]+ m?s +StepRefused: no money", text)
    assert re.search(r"↩ +[\d:.]+ +turns around because of pay", text)
    assert re.search(
        r"✗ +[\d:.]+ +reserve +try 2 +[\d.]+ m?s +cannot be undone: ConnectionError: cannot undo refuse", text
    )
    assert "try 1 after" in text
    helps = re.findall(r"^ +somastack saga (.*)", text, re.MULTILINE)
    assert [line.split(" --why")[0].replace(saga_id, "ID").strip() for line in helps] == [
        "retry ID", "skip ID", "resolve ID --happened",
    ]  # fmt: skip
    other = ran(ask, doubt, "1")
    helps = re.findall(r"^ +somastack saga (.*?) *$", run("inspect", other).output, re.MULTILINE)
    assert len(helps) == 5
    for line in helps[::-1]:  # as they are, pasted
        verb = line.replace("'...'", "because").split()
        assert run(*verb).exit_code == (0 if line == helps[-1] else 1), line


def test_verbs_let_a_saga_go_on(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, bad, "refuse")
    done = run("retry", saga_id, "--why", "the stock is back", "--who", "ann")
    assert (done.exit_code, done.output) == (0, "reserve is tried again\n")
    again = run("retry", saga_id, "--why", "x")
    assert (again.exit_code, "is compensating, not stuck" in again.output) == (1, True)
    assert finished(ask, saga_id).status is SagaStatus.STUCK
    text = run("inspect", saga_id).output
    assert re.search(r"☞ +[\d:.]+ +reserve +ann asks for another try: the stock is back", text)
    assert text.count("cannot be undone") == 2
    refused = run("resolve", saga_id, "--did-not-happen", "--why", "x")
    assert (refused.exit_code, "is being undone" in refused.output, "Cure:" in refused.output) == (1, True, True)
    done = run("skip", saga_id, "--why", "by hand", "--json")
    assert (done.exit_code, json.loads(done.output)) == (0, {"done": True, "saga_id": saga_id, "step": "reserve"})
    assert finished(ask, saga_id).status is SagaStatus.COMPENSATED
    text = run("inspect", saga_id).output
    assert "passes over its compensation: by hand" in text
    assert re.search(r"● +[\d:.]+ +compensated", text)


def test_what_happened_is_said_with_its_result(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, doubt, "1")
    assert "nobody knows whether it took effect" in run("inspect", saga_id).output
    for arguments, words in (
        (("--happened", "--result", "{"), "The result is not JSON"),
        (("--did-not-happen", "--result", "1"), "has no result"),
        ((), "--happened"),
        (("--happened", "--result", '"many"', "--app", f"{__name__}:doubt"), "The result of charge"),
        (("--happened", "--app", "no_such_module:x"), "cannot be loaded"),
    ):
        refused = run("resolve", saga_id, *arguments, "--why", "x")
        assert (refused.exit_code, words in refused.output) == (2, True), refused.output
    done = run(
        "resolve", saga_id, "--happened", "--result", "5", "--why", "the bank says so", "--app", f"{__name__}:ALL"
    )
    assert (done.exit_code, done.output) == (0, "charge is done\n")
    view = finished(ask, saga_id)
    assert (view.status, view.result) == (SagaStatus.COMPLETED, 5)
    assert "says that it happened (5): the bank says so" in run("inspect", saga_id).output


def test_compensate_and_cancel(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, waits, "1", until=is_waiting)
    assert run("compensate", saga_id).exit_code == 2  # no reason
    done = run("compensate", saga_id, "--why", "customer left", "--who", "bob")
    assert (done.exit_code, "it turns around" in done.output) == (0, True)
    again = run("compensate", saga_id, "--why", "x", "--json")
    assert (again.exit_code, json.loads(again.output)) == (1, {"done": False, "saga_id": saga_id})
    text = run("inspect", saga_id).output
    assert re.search(r"asked +to compensate, by bob at .*Z: customer left", text)
    assert "to compensate, waits" in run("list", "--tenant", "shop").output
    assert run("cancel", saga_id, "--why", "now").exit_code == 0
    assert finished(ask, saga_id).status is SagaStatus.COMPENSATED
    late = run("cancel", saga_id, "--why", "x")
    assert (late.exit_code, "cannot turn around" in late.output) == (1, True)


def test_signals(ask: Ask, run: Run) -> None:
    saga_id = ran(ask, waits, "1", until=is_waiting)
    bad_json = run("signal", saga_id, "approved", "{")
    assert (bad_json.exit_code, "The payload is not JSON" in bad_json.output, "Cure:" in bad_json.output) == (
        2,
        True,
        True,
    )
    done = run("signal", saga_id, "approved", "-", "--signal-id", "s1", input="42\n")
    assert (done.exit_code, done.output) == (0, "signal approved is left for it\n")
    again = run("signal", saga_id, "approved", "42", "--signal-id", "s1", "--json")
    assert (again.exit_code, json.loads(again.output)["done"]) == (1, False)
    view = finished(ask, saga_id)
    assert (view.status, view.result) == (SagaStatus.COMPLETED, 42)
    late = run("signal", saga_id, "approved")
    assert (late.exit_code, "takes no signal any more" in late.output) == (1, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect",), ("inspect", "--watch"), ("retry", "--why", "x"), ("skip", "--why", "x"),
        ("resolve", "--happened", "--why", "x"), ("compensate", "--why", "x"), ("cancel", "--why", "x"), ("signal", "n"),
    ],
)  # fmt: skip
def test_ids_that_nobody_has(run: Run, arguments: tuple[str, ...]) -> None:
    verb, *more = arguments
    unknown = run(verb, NOBODY, *more)
    assert (unknown.exit_code, "There is no saga" in unknown.output) == (1, True), unknown.output
    assert "somastack saga list --all-tenants" in unknown.output
    for garbage in ("x", HOSTILE, "", "'; DROP TABLE soma.sagas"):
        refused = run(verb, garbage, *more)
        assert (refused.exit_code, "32 hexadecimal digits" in refused.output) == (2, True), refused.output
        assert "Traceback" not in refused.output
        assert_harmless(click.unstyle(refused.output))


def test_errors_are_one_line_with_a_cure(run: Run) -> None:
    for arguments, words in (
        (("list",), "Name a --tenant"),
        (("list", "--tenant", "t", "--all-tenants"), "exclude each other"),
        (("list", "--tenant", "t", "--status", "odd"), "odd"),
        (("list", "--tenant", "t", "--status", "stuck", "--all"), "exclude each other"),
        (("list", "--tenant", "t", "--cursor", "x"), "32 hexadecimal digits"),
        (("list", "--tenant", "t", "--since", "yesterday"), "yesterday"),
        (("inspect", NOBODY, "--watch", "--json"), "exclude each other"),
        (("retry", NOBODY, "--why", " "), "say why"),
    ):
        done = run(*arguments)
        assert done.exit_code == 2, done.output
        assert words in done.output
        assert "Traceback" not in done.output


def test_what_others_wrote_does_not_steer_the_terminal(ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Saga("hostile", str, pay, hold)
    refused = Saga("hostile-undo", str, SagaStep(reserve, undo=UndoPolicy(max_retries=0)), pay)

    async def work(sagas: Sagas) -> list[str]:
        async with sagas.worker(plain, refused):
            stuck = await sagas.start(refused, "hostile", correlation_id="\u202eC")
            well = await sagas.start(plain, HOSTILE, saga_key="\u202eK")
            return [str((await sagas.ended(each)).saga_id) for each in (stuck, well)]

    monkeypatch.setenv("NO_COLOR", "1")
    stuck, well = ask(work)
    for arguments in (
        ("list", "--all-tenants", "--all"), ("inspect", stuck), ("inspect", well), ("inspect", well, "--watch"),
    ):  # fmt: skip
        for option in ((), ("--json",)) if "--watch" not in arguments else ((),):
            done = run(*arguments, *option)
            assert done.exit_code == 0, done.output
            assert_harmless(done.output)
            assert "2J" in done.output
            assert not any(line.startswith("Cure") for line in done.output.splitlines())
    assert run("retry", stuck, "--why", HOSTILE, "--who", HOSTILE).exit_code == 0
    retried = run("inspect", stuck).output
    assert_harmless(retried)
    assert "\\x9b2J" in retried.split("asks for another try")[1]
    journal = journal_of(run, stuck)
    assert (journal[1]["error"], journal[-1]["why"]) == (HOSTILE, HOSTILE)
    for verb in (("signal", stuck, HOSTILE, "{"), ("graph", HOSTILE), ("graph", HOSTILE, "--app", HOSTILE)):
        assert_harmless(run(*verb).output)


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
def test_tables_fit_a_terminal(ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Ids are whole, for the next command wants them."""
    saga_id = ran(ask, bad, "refuse")
    for name, value in (("FORCE_COLOR", "1"), ("COLUMNS", str(columns)), ("LINES", "40")):
        monkeypatch.setenv(name, value)  # for rich this is a terminal of so many columns
    monkeypatch.delenv("NO_COLOR", raising=False)
    done = run("list", "--tenant", "shop")
    listed = click.unstyle(done.output)
    assert "\x1b[1;31mstuck" in done.output
    assert saga_id in listed
    assert ("correlation" in listed) == (columns == 200)
    assert max(map(len, listed.splitlines())) <= columns
    shown = click.unstyle(run("inspect", saga_id).output)
    for line in shown.splitlines():
        assert len(line) <= columns or line.strip().startswith("somastack saga"), line
    assert f"somastack saga skip {saga_id} --why '...'" in shown
    monkeypatch.setenv("NO_COLOR", "1")
    assert "31m" not in run("list", "--tenant", "shop").output


def test_a_stream_of_ascii_gets_signs_of_ascii(ask: Ask, env: dict[str, str]) -> None:
    saga_id = ran(ask, fine, "1")
    done = subprocess.run(
        [sys.executable, "-m", "soma_common.cli.main", "saga", "inspect", saga_id],
        env=os.environ | env | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.search(rb"^ *\+ +[\d:.]+ +hold", done.stdout, re.MULTILINE), done.stdout


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


def test_graph(ask: Ask, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shop_sagas.py").write_text(
        "from soma_common import Soma, SomaConfig\nfrom soma_common.sagas.models import Saga\n"
        "async def pay(order: str) -> None: ...\n"
        "one = Saga('one', str, pay)\ntwo = [one, Saga('two', str, pay), Saga('two', str, pay, version=2)]\n"
        "app = Soma(SomaConfig.from_env({}), sagas=[one])\nnumber = 5\nodd = [1]\n"
    )
    monkeypatch.chdir(tmp_path)
    drawn = 'flowchart TD\n    n1(["one v1"])\n    n2["pay"]\n    n3(["completed"])\n    n1 --> n2\n    n2 --> n3\n'
    for name in ("one", "two", "app"):
        done = run("graph", "one", "--app", f"shop_sagas:{name}")
        assert (done.exit_code, done.output) == (0, drawn)
    assert '"two v2"' in run("graph", "two", "--app", "shop_sagas:two", "--version", "2").output
    for arguments, words in (
        (("three", "--app", "shop_sagas:two"), "name one of one, two."),
        (("two", "--app", "shop_sagas:two"), "pass --version: 1, 2."),
        (("two", "--app", "shop_sagas:two", "--version", "3"), "no version 3 of two"),
        (("one", "--app", "shop_saga:one"), "No module named"),
        (("one", "--app", "shop_sagas:other"), "has no attribute 'other'"),
        (("one", "--app", "shop_sagas"), "package.module:NAME"),
        (("one", "--app", "shop_sagas:number"), "is a int"),
        (("one", "--app", "shop_sagas:odd"), "1 is no Saga"),
        (("one",), "there are none yet"),
    ):
        refused = run("graph", *arguments)
        assert (refused.exit_code, words in refused.output) == (2, True), refused.output
    assert isinstance(Soma(SomaConfig.from_env({}), sagas=ALL).saga_definitions, tuple)


def test_graph_of_what_workers_registered(ask: Ask, run: Run) -> None:
    ran(ask, waits, "1", until=is_waiting)
    done = run("graph", "waits")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("flowchart TD\n    %% As workers registered it: without compensations.\n")
    assert 'n3("signal approved")' in done.output
    unknown = run("graph", "other")
    assert (unknown.exit_code, "name one of bad-undo, doubt, place-order, sleeps, waits." in unknown.output) == (
        2,
        True,
    )


def test_it_is_a_command_of_somastack(ask: Ask, env: dict[str, str]) -> None:
    saga_id = started(ask, fine)
    done = CliRunner().invoke(somastack, ["saga", "list", "--all-tenants"], env=env)
    assert saga_id in done.output
    assert told(view_of(ask, saga_id).journal) == []
