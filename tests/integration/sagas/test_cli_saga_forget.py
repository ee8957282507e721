"""``somastack saga forget``."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import click
import pytest

from soma_common.errors import ValidationError
from soma_common.postgres.migrate import upgrade
from soma_common.sagas import asking
from tests.integration.sagas.operating import (
    HOSTILE,
    Ask,
    Run,
    assert_harmless,
    bad,
    fine,
    is_waiting,
    ran,
    started,
    waits,
)
from tests.saga_support import Sagas

_AGED = "UPDATE soma.sagas SET ended_at = ended_at - interval '100 days' WHERE saga_id = ANY ($1::text[]::uuid[])"
_LEFT = "SELECT (SELECT count(*) FROM soma.sagas), (SELECT count(DISTINCT saga_id) FROM soma.saga_steps)"
LONG_AGO = f"{datetime.now(UTC) - timedelta(days=90):%Y-%m-%d}"


def aged(ask: Ask, *ids: str) -> None:
    """These ended long ago."""
    ask(lambda sagas: sagas.pool.fetch(_AGED, list(ids)))


def left(ask: Ask) -> tuple[int, int]:
    """How many sagas there are, and how many that have a journal."""
    rows = ask(lambda sagas: sagas.pool.fetch(_LEFT))
    return rows[0][0], rows[0][1]


def test_those_that_ended_long_ago_are_forgotten(ask: Ask, run: Run) -> None:
    old = [ran(ask, fine, "1"), ran(ask, waits, "1", until=is_waiting), ran(ask, bad, "refuse")]
    new = ran(ask, fine, "1")
    aged(ask, *old)  # one waits and one is stuck: those did not end
    counted = run("forget", "--ended-before", LONG_AGO, "--dry-run")
    assert (counted.exit_code, counted.output) == (
        0, f"would be removed: 1 saga that ended before {LONG_AGO} 00:00:00Z\n",
    )  # fmt: skip
    for answer in ("n\n", ""):
        refused = run("forget", "--ended-before", LONG_AGO, input=answer)
        assert (refused.exit_code, "1 saga that ended" in refused.output) == (1, True)
    assert left(ask) == (4, 4)
    done = run("forget", "--ended-before", LONG_AGO, input="y\n")
    assert (done.exit_code, done.stdout) == (0, f"removed: 1 saga that ended before {LONG_AGO} 00:00:00Z\n")
    assert left(ask) == (3, 3)
    assert run("inspect", old[0]).exit_code == 1
    assert run("inspect", new).exit_code == 0
    again = run("forget", "--ended-before", LONG_AGO)  # nothing to ask about
    assert (again.exit_code, "removed: 0 sagas" in again.stdout) == (0, True)


def test_many_go_in_small_transactions(ask: Ask, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FORGOTTEN_AT_ONCE", 2)

    async def work(sagas: Sagas) -> list[str]:
        async with sagas.worker():
            ids = [await sagas.start(fine, str(number)) for number in range(5)]
            return [str((await sagas.ended(each)).saga_id) for each in ids]

    aged(ask, *ask(work))
    options = ("forget", "--ended-before", LONG_AGO, "--json")
    counted = json.loads(run(*options, "--dry-run").output)
    assert counted == {
        "done": True, "sagas": 5, "ended_before": f"{LONG_AGO}T00:00:00+00:00", "dry_run": True,
    }  # fmt: skip
    assert left(ask) == (5, 5)
    assert json.loads(run(*options, "--yes").output) == counted | {"dry_run": False}
    assert left(ask) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "--ended-before"),
        (("--ended-before", ""), "does not match"),
        (("--ended-before", "yesterday"), "does not match"),
        (("--ended-before", HOSTILE), "does not match"),
        (("--ended-before", "2020-01-01'; DROP TABLE soma.sagas"), "does not match"),
        (("--ended-before", "2999-01-01"), "has not come yet"),
        (("--ended-before", "9999-12-31T23:59:59-2359"), "UTC does not have"),
        (("--ended-before", "0001-01-01T00:00:00+2359"), "UTC does not have"),
        (("--ended-before", "2020-01-01", "--json"), "--yes or --dry-run"),
    ],
)
def test_bad_moments_remove_nothing(ask: Ask, run: Run, arguments: tuple[str, ...], words: str) -> None:
    ran(ask, fine, "1")
    refused = run("forget", *arguments, *(() if "--json" in arguments else ("--yes",)))
    assert (refused.exit_code, words in refused.output) == (2, True), refused.output
    assert "Traceback" not in refused.output
    assert_harmless(click.unstyle(refused.output))
    assert left(ask) == (1, 1)


def test_the_first_moment_of_all_is_no_error(run: Run) -> None:
    done = run("forget", "--ended-before", "0001-01-01", "--yes")
    assert (done.exit_code, "removed: 0 sagas" in done.output) == (0, True), done.output


def test_in_code_a_moment_has_an_offset(ask: Ask) -> None:
    for moment in (datetime(2020, 1, 1), "2020-01-01", None):
        wrong: Any = moment
        with pytest.raises(ValidationError, match="ended_before"):
            ask(lambda sagas, wrong=wrong: sagas.orchestrator.forget(ended_before=wrong))


def test_the_role_of_an_application_may_count_and_not_remove(ask: Ask, run: Run, env: dict[str, str]) -> None:
    aged(ask, ran(ask, fine, "1"))
    owner, role = env["SOMASTACK_POSTGRES_DSN"], f"runtime_{uuid4().hex[:12]}"
    password = owner.split("@")[0].rpartition(":")[2]

    async def grant(sagas: Sagas) -> None:
        await sagas.pool.fetch(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        await upgrade(owner, grant_to=role)

    async def remove(sagas: Sagas) -> None:
        await sagas.pool.fetch(f"DROP OWNED BY {role}")
        await sagas.pool.fetch(f"DROP ROLE {role}")

    ask(grant)
    try:
        env["SOMASTACK_POSTGRES_DSN"] = owner.replace("//postgres:", f"//{role}:", 1).replace(password, "x", 1)
        assert run("forget", "--ended-before", LONG_AGO, "--dry-run").output.startswith("would be removed: 1 saga ")
        refused = run("forget", "--ended-before", LONG_AGO, "--yes")
        assert (refused.exit_code, "the role that owns the tables" in refused.output) == (2, True), refused.output
        assert left(ask) == (1, 1)
    finally:
        ask(remove)


def test_one_that_is_new_is_not_there_yet(ask: Ask, run: Run) -> None:
    started(ask, fine)
    now = f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S}"
    assert run("forget", "--ended-before", now, "--yes").output.startswith("removed: 0 sagas")
    assert left(ask)[0] == 1
