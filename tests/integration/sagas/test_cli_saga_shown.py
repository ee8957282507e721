"""What ``somastack saga list`` and ``inspect`` show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import click
import pytest

from soma_common.sagas.models import Saga, SagaStep, UndoPolicy
from tests.integration.sagas.operating import (
    HOSTILE,
    Ask,
    Run,
    assert_harmless,
    bad,
    doubt,
    fine,
    hold,
    is_waiting,
    journal_of,
    pay,
    ran,
    reserve,
    sleeps,
    started,
    waits,
)
from tests.saga_support import Sagas


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
