"""``somastack dlq`` as an operator runs it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from soma_common.cli.dlq import dlq
from soma_common.postgres.pool import Pool
from tests.dlq_support import Desk, Undelivered, failure, undelivered

Ask = Callable[[Callable[[Desk], Awaitable[Any]]], Any]
Run = Callable[..., Result]


@pytest.fixture
def ask(soma_database: str) -> Ask:
    """Runs something with a desk, in a loop of its own: the commands have theirs."""

    async def opened(work: Callable[[Desk], Awaitable[Any]]) -> Any:
        async with Pool(soma_database) as pool:
            return await work(await Desk.open(pool))

    return lambda work: asyncio.run(opened(work))


@pytest.fixture
def run(soma_database: str) -> Run:
    env = {
        "SOMA_DEPLOY_MODE": "somastack",
        "SOMASTACK_POSTGRES_DSN": soma_database,
        "SOMASTACK_KAFKA_BOOTSTRAP": "127.0.0.1:9",
    }
    return lambda *arguments: CliRunner().invoke(dlq, list(arguments), env=env, color=True)


def parked(ask: Ask, *given: Undelivered) -> list[str]:
    """The ids of letters parked for these."""

    async def work(desk: Desk) -> list[str]:
        await desk.park(*given)
        return [str(await desk.id_of(each)) for each in given]

    found: list[str] = ask(work)
    return found


def test_list_show_and_summary(ask: Ask, run: Run) -> None:
    ids = parked(ask, undelivered("a", headers=(("h", b"\x1b[31m"),)), undelivered("b"))
    done = run("list", "--tenant", "t", "--limit", "1")
    assert done.exit_code == 0, done.output
    assert ids[0] in done.output
    assert ids[1] not in done.output
    cursor = done.output.split("--cursor ")[1].strip()
    assert ids[1] in run("list", "--tenant", "t", "--cursor", cursor).output
    listed = json.loads(run("list", "--all-tenants", "--json", "--newest").output)
    assert [letter["letter_id"] for letter in listed["letters"]] == ids[::-1]
    shown = run("show", ids[0])
    assert "ValueError: it failed" in shown.output
    assert "\x1b[31m" not in shown.output
    full = json.loads(run("show", ids[0], "--json").output)
    assert full["record"]["value"] == "eyJuIjogMX0="
    assert full["history"][0]["what"] == "dead"
    groups = json.loads(run("summary", "--tenant", "t", "--json").output)
    assert [(group["count"], group["status"]) for group in groups] == [(2, "dead")]
    assert "ValueError" in run("summary", "--tenant", "t", "--status", "dead").output  # as it is shown


def test_what_a_letter_says_does_not_steer_the_terminal(ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """JSON left C1 control characters (one of them begins a sequence as ESC [ does) and bidirectional ones as they are."""
    hostile = "\x9b2J \x1b]0;title\x07 \u202eevil"
    one = undelivered(hostile, value=hostile.encode(), headers=((hostile, hostile.encode()),))

    async def park(desk: Desk) -> str:
        await desk.letters.park(one, failure(hostile), attempts=1, retry_in=None)
        await desk.dlq.edit(await desk.dlq.show(await desk.id_of(one)), hostile.encode(), why=hostile)
        return str(await desk.id_of(one))

    letter = ask(park)
    monkeypatch.setenv("NO_COLOR", "1")
    for verb in (("list", "--all-tenants"), ("show", letter), ("summary", "--all-tenants")):
        for option in ((), ("--json",)):
            done = run(*verb, *option)
            assert done.exit_code == 0, done.output
            assert "2J" in done.output
            assert all(character.isprintable() or character == "\n" for character in done.output), done.output
    shown = json.loads(run("show", letter, "--json").output)
    assert (shown["message"], shown["history"][-1]["why"]) == (hostile, hostile)
    refused = run("list", "--tenant", "t", "--cursor", hostile)
    assert refused.exit_code == 2
    assert all(character.isprintable() or character == "\n" for character in refused.output), refused.output


@pytest.mark.parametrize("columns", ["80", "120", "200"])
def test_what_the_next_command_wants_is_whole_on_a_terminal(
    ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    """Ids and fingerprints were folded over four lines, and nobody could copy them."""
    (letter,) = parked(ask, undelivered("a"))
    (group,) = json.loads(run("summary", "--tenant", "t", "--json").output)
    for name, value in (("FORCE_COLOR", "1"), ("NO_COLOR", "1"), ("COLUMNS", columns)):
        monkeypatch.setenv(name, value)  # for rich this is a terminal of so many columns
    listed = click.unstyle(run("list", "--tenant", "t").output)
    assert letter in listed
    assert ("record" in listed) == (columns == "200")
    assert max(map(len, listed.splitlines())) <= int(columns)
    assert group["fingerprint"] in run("summary", "--tenant", "t").output


def test_retry_and_its_exit_codes(ask: Ask, run: Run) -> None:
    (letter,) = parked(ask, undelivered("a"))
    assert "would be tried" in run("retry", letter, "--dry-run").output
    assert run("retry", letter, "--who", "ann").exit_code == 0
    again = run("retry", letter)
    assert (again.exit_code, "asked for before" in again.output) == (1, True)
    assert run("retry", letter, "--dry-run").exit_code == 1
    assert ask(lambda desk: desk.dlq.history(letter))[-1].who == "ann"


def test_retry_all(ask: Ask, run: Run) -> None:
    parked(ask, *(undelivered(f"k{n}") for n in range(5)))
    assert json.loads(run("retry-all", "--tenant", "t", "--dry-run", "--json").output) == {
        "letters": 5,
        "dry_run": True,
    }
    assert "2 letters will be tried again" in run("retry-all", "--tenant", "t", "--max", "2").output
    assert "3 letters will be tried again" in run("retry-all", "--tenant", "t").output
    assert "0 letters will be tried again" in run("retry-all", "--tenant", "t").output


def test_edit_and_discard(ask: Ask, run: Run, tmp_path: Any) -> None:
    (letter,) = parked(ask, undelivered("a"))
    assert "would be edited" in run("edit", letter, "--value", "{}", "--dry-run").output
    for value in ("notjson", "x" * 20):  # what the edit itself would refuse
        tried = run("edit", letter, "--value", value, "--dry-run")
        assert (tried.exit_code, "not JSON" in tried.output) == (2, True)
    assert "revision 1" in run("edit", letter, "--value", '{"n": 2}', "--who", "ann").output
    (tmp_path / "v").write_bytes(b"\xff")
    refused = run("edit", letter, "--file", str(tmp_path / "v"))
    assert (refused.exit_code, "not JSON" in refused.output) == (2, True)
    assert "revision 2" in run("edit", letter, "--file", str(tmp_path / "v"), "--raw").output
    assert run("edit", letter).exit_code == 2
    shown = run("show", letter).output
    assert "edited" in shown
    assert run("discard", letter).exit_code == 2  # no reason
    assert "is dead" in run("discard", letter, "--reason", "x", "--dry-run").output
    assert run("discard", letter, "--reason", "garbage").exit_code == 0
    assert run("discard", letter, "--reason", "garbage").exit_code == 1
    for further in ((), ("--dry-run",)):
        gone = run("edit", letter, "--value", "{}", *further)
        assert (gone.exit_code, "is discarded" in gone.output) == (1, True)
    again = run("discard", letter, "--reason", "x", "--dry-run")
    assert (again.exit_code, "nothing would be done" in again.output) == (1, True)


def test_verbs_of_one_letter_tell_programs_too(ask: Ask, run: Run) -> None:
    (letter,) = parked(ask, undelivered("a"))
    edit, discard = ("edit", letter, "--value", "{}"), ("discard", letter, "--reason", "x")
    for arguments, code, facts in (
        (("retry", letter, "--dry-run"), 0, {"done": True, "dry_run": True, "status": "dead"}),
        (("retry", letter), 0, {"done": True, "dry_run": False}),
        (("retry", letter), 1, {"done": False, "dry_run": False}),
        ((*edit, "--dry-run"), 0, {"done": True, "dry_run": True, "size": 2}),
        (edit, 0, {"done": True, "dry_run": False, "revision": 1}),
        ((*discard, "--dry-run"), 0, {"done": True, "dry_run": True, "status": "redriving"}),
        (discard, 0, {"done": True, "dry_run": False}),
        (discard, 1, {"done": False, "dry_run": False}),
    ):
        done = run(*arguments, "--json")
        assert (done.exit_code, json.loads(done.output)) == (code, facts | {"letter_id": letter})


def test_one_tenant_and_all_of_them_exclude_each_other(ask: Ask, run: Run) -> None:
    """All tenants' letters were tried again, though one was named."""
    parked(ask, undelivered("a"))
    for verb in ("list", "summary", "retry-all"):
        done = run(verb, "--tenant", "nobody", "--all-tenants")
        assert (done.exit_code, "exclude each other" in done.output) == (2, True)
    assert json.loads(run("summary", "--tenant", "t", "--json").output)[0]["status"] == "dead"


def test_errors_are_one_line_with_a_cure(run: Run) -> None:
    for arguments, code, words in (
        (("list",), 2, "Name a --tenant"),
        (("list", "--tenant", "t", "--cursor", "x"), 2, "next_cursor"),
        (("show", "x"), 2, "32 hexadecimal digits"),
        (("show", "00000000-0000-7000-8000-000000000000"), 1, "no dead letter"),
        (("list", "--tenant", "t", "--status", "odd"), 2, "odd"),
    ):
        done = run(*arguments)
        assert done.exit_code == code, done.output
        assert words in done.output
        assert "Traceback" not in done.output


def test_a_dry_run_says_what_the_command_would_do(ask: Ask, run: Run) -> None:
    first, later = undelivered("a"), undelivered("a")

    async def work(desk: Desk) -> list[str]:
        await desk.park(first)
        await desk.block(later)
        return [str(await desk.id_of(each)) for each in (first, later)]

    ids = ask(work)
    refused = run("edit", ids[0], "--value", "no json", "--dry-run")
    assert (refused.exit_code, "not JSON" in refused.output) == (2, True)
    assert "would be edited" in run("edit", ids[0], "--value", "no json", "--raw", "--dry-run").output
    assert run("retry", ids[1], "--dry-run").exit_code == 0
    assert run("retry", ids[1]).exit_code == 0
    for each in ids:  # they wait for their try already
        assert (run("retry", each, "--dry-run").exit_code, run("retry", each).exit_code) == (1, 1)
    for verb in (("discard", "--reason", "x"), ("edit", "--value", "{}")):
        assert run(verb[0], ids[0], *verb[1:], "--dry-run").exit_code == 0
    assert run("discard", ids[0], "--reason", "garbage").exit_code == 0
    for verb in (("discard", "--reason", "x"), ("edit", "--value", "{}"), ("retry",)):
        assert run(verb[0], ids[0], *verb[1:], "--dry-run").exit_code == 1, verb
        assert run(verb[0], ids[0], *verb[1:]).exit_code == 1, verb
    assert ask(lambda desk: desk.rows()) == [(first.record.offset, "discarded"), (later.record.offset, "blocked")]


def test_a_dry_run_counts_what_lies_behind_the_cursor(ask: Ask, run: Run) -> None:
    parked(ask, *(undelivered(f"k{n}") for n in range(5)))
    cursor = run("list", "--tenant", "t", "--limit", "2").output.split("--cursor ")[1].strip()
    assert "3 letters match" in run("retry-all", "--tenant", "t", "--after", cursor, "--dry-run").output
    assert "3 letters will be tried again" in run("retry-all", "--tenant", "t", "--after", cursor).output


def test_who_acts_where_the_login_has_no_name(ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number of its own."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 1234567)
    (letter,) = parked(ask, undelivered("a"))
    done = run("retry", letter)
    assert done.exit_code == 0, done.output
    assert ask(lambda desk: desk.dlq.history(letter))[-1].who == "uid 1234567"
