"""``somastack events`` as an operator runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from soma_common.escaping import plain
from soma_common.events.models import Event
from tests.integration.replay.conftest import nothing

APP = """
from soma_common import Soma

soma = Soma.from_env(service_id="tests")
broken = "{broken}"


@soma.handler("order.paid", consumer="billing")
async def apply(event, ctx):
    if broken and event.payload["n"] == 30:
        raise ValueError(broken)
    await ctx.tx.execute("INSERT INTO effect (event_id, number) VALUES ($1, $2)", event.event_id, event.payload["n"])


number = 7
"""


def environment(dsn: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOMA")}
    paths = os.pathsep.join(path for path in sys.path if path)
    return clean | {"SOMA_DEPLOY_MODE": "standalone", "SOMASTACK_POSTGRES_DSN": dsn, "PYTHONPATH": paths}


class Somastack:
    """Runs the command against one database, in a folder that holds an application."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn, self.folder = dsn, folder
        self.write()

    def write(self, broken: str = "") -> None:
        (self.folder / "shop.py").write_text(APP.replace("{broken}", broken))

    def __call__(self, *arguments: str, code: int = 0) -> str:
        command = [sys.executable, "-m", "soma_common.cli.main", "events", *arguments]
        done = subprocess.run(
            command,
            env=environment(self.dsn),
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stderr
        return done.stdout if code == 0 else done.stderr

    def follow(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "soma_common.cli.main", "events", *arguments]
        return subprocess.Popen(
            command,
            env=environment(self.dsn),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


@pytest.fixture
def somastack(replays: Any, tmp_path: Path) -> Somastack:
    return Somastack(replays.dsn, tmp_path)


async def test_list_and_show(replays: Any, somastack: Somastack) -> None:
    events = await replays.publish(30)
    await replays.publish(3, tenant_id="globex", event_type="order.shipped")
    assert len(somastack("list", "--tenant", "acme", "--limit", "7").splitlines()) == 7
    rows = [json.loads(line) for line in somastack("list", "--all-tenants", "--json", "--limit", "100").splitlines()]
    assert [row["position"] for row in rows] == sorted(row["position"] for row in rows)
    assert len(rows) == 33
    for option, value in (("--type", "order.shipped"), ("--tenant", "globex")):
        found = somastack("list", *(() if option == "--tenant" else ("--all-tenants",)), option, value, "--json")
        assert len(found.splitlines()) == 3
    whole = json.loads(somastack("show", str(events[4].event_id), "--tenant", "acme"))
    assert (whole["event_id"], whole["payload"]) == (str(events[4].event_id), {"n": 4})
    assert "There is no event" in somastack("show", str(events[4].event_id), "--tenant", "globex", code=1)


async def test_bad_input_is_one_line_with_a_cure(somastack: Somastack) -> None:
    for verb in (("list",), ("tail",), ("show", "00000000-0000-7000-8000-000000000000"), ("replay", "--dry-run")):
        assert "--all-tenants" in somastack(*verb, code=2)
        assert "exclude each other" in somastack(*verb, "--tenant", "a", "--all-tenants", code=2)
    assert "exclude each other" in somastack("list", "--tenant", "a", "--all-tenants", code=2)
    assert "not an id" in somastack("show", "x'; DROP TABLE soma.events", "--all-tenants", code=1)
    assert "--since" in somastack("list", "--all-tenants", "--since", "yesterday", code=2)
    backwards = ("--since", "2026-02-01", "--until", "2026-01-01")
    assert "is not before until" in somastack("tail", "--all-tenants", *backwards, "--follow", code=1)
    assert "trace_id" in somastack("list", "--all-tenants", "--trace", "zz", code=1)
    assert "No application" in somastack("replay", "--all-tenants", code=1)
    assert "cannot be loaded" in somastack("replay", "--all-tenants", "--app", "no.such:thing", code=1)
    assert "is a int" in somastack("replay", "--all-tenants", "--app", "shop:number", code=1)
    assert "exclude" in somastack("replay", "--dry-run", "--cancel", "x", code=2)
    assert "No consumer 'billing'" in somastack("replay", "--dry-run", "--all-tenants", "--consumer", "billing", code=1)


async def test_a_trace_and_a_time_have_two_names_each(replays: Any, somastack: Somastack) -> None:
    events = await replays.publish(12, keys=1)  # their times differ
    await replays.passed_by()
    trace = events[4].trace_id
    first, end = (event.timestamp.isoformat() for event in (events[3], events[8]))
    for trace_id, since, until in (("--trace-id", "--from", "--to"), ("--trace", "--since", "--until")):
        for verb in ("list", "tail"):
            found = somastack(verb, "--all-tenants", trace_id, trace, "--json").splitlines()
            assert {json.loads(line)["trace_id"] for line in found} == {trace}
            found = somastack(verb, "--all-tenants", since, first, until, end, "--json").splitlines()
            assert [json.loads(line)["payload"]["n"] for line in found] == [3, 4, 5, 6, 7]
        planned = ("replay", "--dry-run", "--all-tenants", "--consumer", "billing", "--json")
        assert json.loads(somastack(*planned, since, first, until, end))["total"] == 5
        assert json.loads(somastack(*planned, trace_id, trace))["total"] == sum(e.trace_id == trace for e in events)


async def test_tail_and_follow(replays: Any, somastack: Somastack) -> None:
    await replays.publish(20)
    lines = somastack("tail", "--all-tenants", "-n", "5", "--json").splitlines()
    assert [json.loads(line)["payload"]["n"] for line in lines] == [15, 16, 17, 18, 19]
    following = somastack.follow("tail", "--tenant", "acme", "-n", "1", "--follow", "--json", "--type", "order.paid")
    try:
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["payload"]["n"] == 19
        await replays.publish(2, start=50, tenant_id="globex")
        await replays.publish(2, start=60, event_type="order.shipped")
        await replays.publish(2, start=70)
        assert [json.loads(following.stdout.readline())["payload"]["n"] for _ in range(2)] == [70, 71]
        following.send_signal(signal.SIGINT)
        assert following.wait(30) == 130
    finally:
        following.kill()
        following.communicate()


async def test_a_dry_run_counts_and_records_nothing(replays: Any, somastack: Somastack) -> None:
    await replays.publish(40)
    await replays.passed_by()
    await replays.forget("e.position <= 10")
    told = somastack("replay", "--dry-run", "--all-tenants", "--consumer", "billing")
    assert "missing replay of billing: 40 events, 30 known to its inbox" in told
    plan = json.loads(somastack("replay", "--dry-run", "--tenant", "acme", "--consumer", "billing", "--json"))
    assert (plan["total"], plan["known"], plan["by_type"]) == (40, 30, {"order.paid": 40})
    assert await replays.pool.fetch("SELECT FROM soma.replays") == []


async def test_replay_fails_is_resumed_and_is_done(replays: Any, somastack: Somastack) -> None:
    await replays.publish(60)
    await replays.passed_by(nothing)
    await replays.forget()
    arguments = ("replay", "--all-tenants", "--consumer", "billing", "--app", "shop:soma")
    somastack.write(broken="bad luck")
    told = somastack(*arguments, code=1)
    assert "bad luck" in told
    assert await replays.count() == 30
    somastack.write()
    run = str((await replays.pool.fetch("SELECT run_id FROM soma.replays"))[0][0])
    done = json.loads(somastack(*arguments, "--resume", run, "--json").splitlines()[-1])
    assert (done["state"], done["read"], done["applied"], done["fraction"]) == ("done", 60, 60, 1.0)
    assert [row[3] for row in await replays.effects()] == list(range(60))
    assert "is done" in somastack("replay", "--tenant", "acme", "--consumer", "billing", "--cancel", run, code=1)
    assert "events replays" in somastack("replay", "--pause", "0" * 32, code=1)
    assert "events replays" in somastack("replay", "--pause", "the first", code=1)
    assert "who wants it" in somastack(*arguments, "--mode", "force", code=1)
    somastack(*arguments, "--mode", "force", "--by", "ann", "--why", "ticket 7", "--rate", "1000")
    assert await replays.count() == 120
    audit = await replays.pool.fetch("SELECT requested_by, reason FROM soma.replays WHERE mode = 'force'")
    assert [tuple(row) for row in audit] == [("ann", "ticket 7")]


async def test_replays_are_listed_the_newest_first(replays: Any, somastack: Somastack) -> None:
    assert somastack("replays") == ""
    await replays.publish(30)
    await replays.passed_by(nothing)
    async with replays.engine() as engine:
        first = await engine.start(replays.everything)
        await replays.finish(engine, first)
        second = await engine.start(replays.everything, "force", requested_by="ann", reason="ticket 7", rate=5)
        await engine.pause(second.run_id)
    hostile = "ann\u202e \x9b2J"  # the engine takes no such name; a row written by hand may have it
    await replays.pool.fetch("UPDATE soma.replays SET requested_by = $1 WHERE run_id = $2", hostile, second.run_id)
    lines = [line.split("\t") for line in somastack("replays").splitlines()]
    when = [f"{run.created_at:%Y-%m-%d %H:%M}Z" for run in (first, second)]
    assert lines == [
        [str(second.run_id), "billing", "force", "log", "paused", "0/0", when[1], plain(hostile)],
        [str(first.run_id), "billing", "missing", "log", "done", "30/0", when[0], "-"],
    ]
    told = somastack("replays", "--json", "--limit", "1")
    assert told.replace("\n", "").isprintable()
    (run,) = map(json.loads, told.splitlines())
    assert (run["run_id"], run["state"], run["read"]) == (str(second.run_id), "paused", 0)
    assert (run["consumer"], run["mode"], run["source"], run["rate"]) == ("billing", "force", "log", 5.0)
    assert (run["requested_by"], run["reason"], run["error"], run["ended_at"]) == (hostile, "ticket 7", None, None)
    somastack("replay", "--consumer", "billing", "--cancel", lines[0][0])
    assert somastack("replays").splitlines()[0].split("\t")[4] == "cancelled"


async def test_rebuild_on_the_command_line(replays: Any, somastack: Somastack, tmp_path: Path) -> None:
    await replays.publish(60)
    await replays.passed_by(nothing)
    arguments = ("replay", "--all-tenants", "--consumer", "billing", "--app", "shop:soma", "--mode", "rebuild")
    assert "--table" in somastack(*arguments, code=1)
    assert "go with --mode rebuild" in somastack("replay", "--all-tenants", "--table", "effect", code=2)
    assert "covers all events" in somastack(
        "replay", "--tenant", "acme", *arguments[2:], "--table", "effect", code=1
    )  # fmt: skip
    assert "no such table does not exist" in somastack(*arguments, "--table", "no such table", code=1).replace(
        '"', ""
    ).replace("public.", "")
    caught_up = json.loads(somastack(*arguments, "--table", "effect", "--no-swap", "--json").splitlines()[-1])
    assert (caught_up["state"], caught_up["applied"], await replays.count()) == ("running", 60, 0)
    run = caught_up["run_id"]
    done = json.loads(somastack(*arguments, "--resume", run, "--json").splitlines()[-1])
    assert (done["state"], await replays.count()) == ("done", 60)
    (tmp_path / "shape.sql").write_text("CREATE TABLE effect (event_id uuid PRIMARY KEY, number bigint, note text);")
    somastack(*arguments, "--table", "effect", "--create", "shape.sql")
    assert await replays.pool.fetch("SELECT count(*), count(note) FROM effect") == [(60, 0)]
    somastack.write(broken="bad luck")
    assert "bad luck" in somastack(*arguments, "--table", "effect", code=1)
    failed = (await replays.pool.fetch("SELECT run_id FROM soma.replays WHERE state = 'failed'"))[0][0]
    assert "is failed" in somastack(*arguments, "--table", "effect", code=1)
    cancelled = somastack("replay", "--consumer", "billing", "--cancel", str(failed), "--json")  # needs no tenant
    assert json.loads(cancelled)["state"] == "cancelled"
    assert not await replays.pool.fetch("SELECT FROM pg_namespace WHERE nspname LIKE 'soma\\_rebuild%'")
    assert await replays.count() == 60


async def test_what_could_move_a_cursor_is_escaped(replays: Any, somastack: Somastack) -> None:
    """Names hold no control characters; payloads may, and old rows written by hand."""
    await replays.store.publish(
        Event(payload={"x": "\x1b[2J"}, event_type="order.paid", tenant_id="a", aggregate_id="b\u202ec")
    )
    for told in (somastack("list", "--all-tenants"), somastack("list", "--all-tenants", "--json")):
        assert "\x1b" not in told
        assert len(told.splitlines()) == 1
    assert "\u202e" not in somastack("list", "--all-tenants")
    assert plain("\x1b[2J\r\n") == r"\x1b[2J\r\n"
    assert plain("é 🔗") == "é 🔗"


async def test_a_payload_does_not_steer_the_terminal(replays: Any, somastack: Somastack) -> None:
    """JSON leaves C1 control characters (one of them begins a sequence as ESC [ does) and bidirectional ones as they are."""
    hostile = "\x9b2J \u202eevil\u2066 \x7f \U000e0041 \u2028 plain \u00e9"
    (event,) = await replays.store.publish(
        [Event(payload={"x": hostile}, event_type="order.paid", tenant_id="a", aggregate_id="b")]
    )
    for told in (
        somastack("show", str(event.event_id), "--all-tenants"),
        somastack("list", "--all-tenants", "--json"),
        somastack("tail", "--all-tenants", "--json"),
    ):
        assert all(character.isprintable() or character == "\n" for character in told)
        assert json.loads(told)["payload"] == {"x": hostile}
    assert "\u00e9" in told


async def test_a_reader_that_has_seen_enough(replays: Any, somastack: Somastack) -> None:
    """As in ``| head``: no traceback."""
    await replays.publish(300)
    following = somastack.follow("tail", "--all-tenants", "-n", "300", "--follow", "--json")
    try:
        assert following.stdout is not None
        assert following.stderr is not None
        following.stdout.readline()
        following.stdout.close()
        await replays.publish(2000, start=300)
        assert following.wait(60) == 1
        assert following.stderr.read() == ""
    finally:
        following.kill()
        following.wait()
        following.stderr.close()
