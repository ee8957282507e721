"""``somastack replay``: planned, started, paused, resumed, run and cancelled, each by a command of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from soma_common.cli.new import write
from tests.cli_support import somastack, told

APP = "shop_one.app:soma"


@pytest.fixture
def project(tmp_path: Path, soma_database: str) -> dict[str, Any]:
    """A project whose consumer has applied three orders, and whose table was emptied since."""
    write(tmp_path / "project", {"name": "shop-one", "package": "shop_one", "version": "0"})
    (tmp_path / "project" / "fill.py").write_text(
        "import asyncio\nfrom shop_one.app import soma, make_tables\nfrom shop_one.events import OrderPlaced\n"
        "from soma_common import Event\n"
        "async def main():\n"
        "    async with soma:\n"
        "        await make_tables(soma)\n"
        "        for n in range(3):\n"
        "            await soma.publish(Event(payload=OrderPlaced(item='lamp', cents=1), tenant_id='acme', aggregate_id=f'o-{n}'))\n"
        "        await soma.drain()\n"
        "        await soma.pool.fetch('DELETE FROM sales')\n"
        "asyncio.run(main())\n"
    )
    import subprocess
    import sys

    from tests.cli_support import environment

    env = {"SOMASTACK_POSTGRES_DSN": soma_database}
    subprocess.run([sys.executable, "fill.py"], cwd=tmp_path / "project", env=environment(**env), check=True)
    return {"cwd": tmp_path / "project", **env}


def test_from_the_plan_to_the_end(project: dict[str, Any], soma_postgres: Any) -> None:
    who = ("--tenant", "acme", "--consumer", "sales")
    plan = told(somastack("replay", "plan", *who, "--mode", "force", "--json", **project))
    assert (plan["total"], plan["by_type"]) == (3, {"order.placed": 3})
    refused = somastack("replay", "start", *who, "--mode", "force", **project)
    assert (refused.returncode, "--by and --why" in refused.stderr) == (1, True)
    run = told(
        somastack("replay", "start", *who, "--mode", "force", "--by", "ann", "--why", "lost", "--json", **project)
    )
    of = (run["run_id"], "--consumer", "sales")
    assert run["state"] == "planned"
    assert f"replay {of[0]} is paused" in somastack("replay", "pause", *of, **project).stdout
    assert somastack("replay", "pause", *of, **project).returncode == 1
    assert told(somastack("replay", "resume", *of, "--json", **project))["state"] == "planned"
    assert somastack("replay", "pause", *of, **project).returncode == 0
    done = somastack("replay", "run", *of, "--app", APP, **project)
    assert done.returncode == 0, done.stderr
    assert "done 100%: 3 read, 3 applied" in done.stdout
    database = project["SOMASTACK_POSTGRES_DSN"].rpartition("/")[2]
    assert soma_postgres.sql.query("SELECT orders FROM sales", database=database) == "3"
    cancelled = told(somastack("replay", "start", *who, "--json", **project))["run_id"]
    assert (
        told(somastack("replay", "cancel", cancelled, "--consumer", "sales", "--json", **project))["state"]
        == "cancelled"
    )
    lines = somastack("replay", "list", "--json", **project).stdout.splitlines()
    assert [json.loads(line)["state"] for line in lines] == ["cancelled", "done"]
    assert lines == somastack("events", "replays", "--json", **project).stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("plan",), 2),  # whose events?
        (("plan", "--tenant", "a", "--all-tenants"), 2),
        (("start", "--tenant", "a", "--table", "sales"), 2),
        (("run", "x"), 2),
        (("run", "x", "--consumer", "sales", "--app", APP), 1),
        (("pause", "\x1b[31m"), 1),
        (("cancel", "00000000-0000-0000-0000-000000000000", "--consumer", "sales"), 1),
    ],
)
def test_what_cannot_be_done_is_refused(arguments: tuple[str, ...], code: int, project: dict[str, Any]) -> None:
    done = somastack("replay", *arguments, **project)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr
