"""``somastack retention`` and events of archives, as an operator uses them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from soma_common.errors import ConfigurationError
from soma_common.postgres import migrate
from soma_common.postgres.pool import Pool
from soma_common.retention.policy import RetentionPolicy
from soma_common.retention.running import RetentionRun
from soma_common.testing.lane.sql_tools import SqlTools
from tests.integration.retention.conftest import MONTH
from tests.waiting import until

POLICY = """
archive = "{archive}"
[events]
"telemetry.*" = "30 days"
[keep]
letters = "90 days"
"""


class Somastack:
    """The command against one database that lives 60 days from now, with a policy in a file."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn, self.folder, self.policy = dsn, folder, folder / "retention.toml"
        self.policy.write_text(POLICY.format(archive=folder / "archives"))

    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA", "AWS"))}
        dsn = f"{self.dsn}{'&' if '?' in self.dsn else '?'}options=-csoma.clock_offset%3D5184000s"
        paths = os.pathsep.join(path for path in sys.path if path)
        clean |= {
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_SHARED_CREDENTIALS_FILE": "/nowhere",
            "AWS_CONFIG_FILE": "/nowhere",
        }
        return clean | {"SOMA_DEPLOY_MODE": "standalone", "SOMASTACK_POSTGRES_DSN": dsn, "PYTHONPATH": paths}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "soma_common.cli.main", *arguments]
        return subprocess.Popen(
            command, env=self.environment(), cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *arguments: str, code: int = 0) -> str:
        started = self.start(*arguments)
        out, err = started.communicate(timeout=150)
        assert started.returncode == code, (out, err)
        assert "Traceback" not in err
        return out if code == 0 else err + out

    def retention(self, *arguments: str, code: int = 0) -> str:
        return self("retention", *arguments, code=code)


@pytest.fixture
def somastack(retained: Any, tmp_path: Path) -> Somastack:
    return Somastack(retained.dsn, tmp_path)


async def test_plan_run_list_verify_and_read(retained: Any, somastack: Somastack) -> None:
    events = await retained.fill(300, types=("order.paid", "telemetry.seen"))
    given = ("--policy", str(somastack.policy))
    planned = json.loads(somastack.retention("plan", *given, "--json"))
    assert [step["action"] for step in planned["steps"]] == ["thin"] * 3
    told = somastack.retention("run", *given, "--dry-run")
    assert told.count("telemetry.seen") == 3
    assert "letters: 0" in told
    assert len(await retained.log()) == 300
    told = somastack.retention("run", *given, "--who", "ann")
    assert told.count("removed ") == 3
    assert "nothing is past its time" not in told
    assert somastack.retention("run", *given) == "letters: 0 gone\nnothing is past its time\n"
    listed = json.loads(somastack.retention("archives", "list", "--json"))
    assert {(each["state"], each["made_by"]) for each in listed} == {("removed", "ann")}
    assert len(somastack.retention("archives", "list").splitlines()) == 3
    place = ("--archive", str(somastack.folder / "archives"))
    assert somastack.retention("archives", "verify", *place).count("\twhole") == 3
    archived = [event for event in events if event.event_type == "telemetry.seen"][: sum(e["events"] for e in listed)]
    lines = somastack("events", "list", "--all-tenants", *place, "--json", "--limit", "1000").splitlines()
    assert [json.loads(line)["event_id"] for line in lines] == [str(event.event_id) for event in archived]
    shown = json.loads(somastack("events", "show", str(archived[7].event_id), "--tenant", "acme", *place))
    assert (shown["payload"], shown["position"]) == (archived[7].payload, archived[7].position)
    assert "There is no event" in somastack(
        "events", "show", str(events[0].event_id), "--tenant", "acme", *place, code=1
    )
    part = sorted((somastack.folder / "archives").rglob("part-*.avro"))[0]
    part.write_bytes(part.read_bytes()[:-1])
    told = somastack.retention("archives", "verify", *place, code=1)
    assert told.count("\twhole") == 2
    assert "SHA-256" in told
    await retained.log()


async def test_a_forced_run_asks_for_a_reason_and_a_reader_is_let_on(retained: Any, somastack: Somastack) -> None:
    await retained.fill(300, types=("telemetry.seen",))
    await retained.pool.fetch("INSERT INTO soma.shards (reader, shard) VALUES ('consumer:billing', 0)")
    given = ("--policy", str(somastack.policy))
    assert "not passed by consumer:billing" in somastack.retention("run", *given)
    assert len(await retained.log()) == 300
    assert "why is ''" in somastack.retention("run", *given, "--force", code=1)
    assert "excludes --every" in somastack.retention("run", *given, "--force", "--every", "1", code=2)
    assert somastack.retention("run", *given, "--force", "--why", "no space", "--who", "ann").count("removed ") == 3
    assert "ann: no space" in somastack.retention("archives", "list")
    told = somastack.retention("accept", "consumer:billing", "--why", "it is rebuilt", "--who", "ann")
    assert "consumer:billing may go on" in told
    rows = await retained.pool.fetch("SELECT reader, accepted_by, reason FROM soma.reader_gaps")
    assert [tuple(row) for row in rows] == [("consumer:billing", "ann", "it is rebuilt")]
    assert "reader is" in somastack.retention("accept", "a\nb", "--why", "x", code=1)
    assert "consumer:billing" in somastack.retention("accept", "billing", "--why", "x", code=1)


async def test_bad_input_is_one_line_with_a_cure(somastack: Somastack) -> None:
    given = ("--policy", str(somastack.policy))
    assert "cannot be read" in somastack.retention("plan", "--policy", "missing.toml", code=1)
    somastack.policy.write_text("[events]\n'*; DROP TABLE soma.events' = '1 day'")
    assert "no pattern of event types" in somastack.retention("plan", *given, code=1)
    somastack.policy.write_text("[events]\ndefault = '30 days'")
    assert "no place for archives" in somastack.retention("run", *given, code=1)
    assert "credentials" in somastack("events", "list", "--all-tenants", "--archive", "s3://bucket/x", code=1)
    assert "no name of a bucket" in somastack.retention("run", *given, "--archive", "s3://UPPER/x", code=1)
    assert "cannot go to" in somastack.retention("run", *given, "--archive", "ftp://x", code=1)
    assert "--every" in somastack.retention("run", *given, "--every", "0", code=2)
    assert "no folder" in somastack("events", "list", "--all-tenants", "--archive", "nowhere", code=1)


async def test_a_service_runs_until_it_is_told_to_stop(retained: Any, somastack: Somastack) -> None:
    await retained.fill(200, types=("order.paid", "telemetry.seen"))
    service = somastack.start("retention", "run", "--policy", str(somastack.policy), "--every", "60")
    try:

        async def done() -> bool:
            rows = await retained.pool.fetch("SELECT count(*) FROM soma.archives WHERE state = 'removed'")
            return bool(rows[0][0] == 2)

        await until(done, within=90)
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
    finally:
        service.kill()
        service.communicate()


async def test_the_role_of_an_application_may_not_remove(retained: Any) -> None:
    role = "soma_app_" + retained.dsn.rpartition("/")[2].partition("?")[0][-8:]
    admin = SqlTools.at(retained.dsn)
    admin.query(f"CREATE ROLE {role} LOGIN PASSWORD 'pw'")
    try:
        await migrate.upgrade(retained.dsn, grant_to=role)
        await retained.fill(200)
        async with Pool(re.sub(r"//[^@]+@", f"//{role}:pw@", retained.dsn)) as pool:
            run = RetentionRun(pool, RetentionPolicy(default=MONTH), retained.storage, who="mallory")
            with pytest.raises(ConfigurationError, match="role that owns the tables"):
                await run.run()
            for forbidden in (
                "SELECT soma.drop_archived(gen_random_uuid(), gen_random_uuid())", "SELECT soma.maintain_inbox()",
                "SELECT soma.begin_removal(gen_random_uuid(), gen_random_uuid(), 'a', 'b')",
                "SELECT * FROM soma.thin_archived(gen_random_uuid(), gen_random_uuid(), 'a', 0, 1)",
                "SELECT soma.empty_inbox('inbox_first', gen_random_uuid(), '1')", "DELETE FROM soma.archives",
                "UPDATE soma.log_start SET tick_id = 0", "UPDATE soma.retention_lease SET who = 'me'",
                "SELECT set_config('soma.removing', 'x', false)::int; DELETE FROM soma.events",
            ):  # fmt: skip
                with pytest.raises(Exception, match=r"permission denied|must be owner|refused|cannot insert"):
                    await pool.fetch(forbidden)
            assert len(await pool.fetch("SELECT soma.require_read('x', 0)")) == 1
        assert len(await retained.log()) == 200
    finally:
        admin.query(f"DROP OWNED BY {role}; DROP ROLE {role}")
