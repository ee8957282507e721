"""``somastack saga`` as an operator runs it: what it does to sagas."""

from __future__ import annotations

import json
import re

import click
import pytest
from click.testing import CliRunner

from soma_common.cli.main import somastack
from soma_common.sagas.models import SagaStatus
from tests.integration.sagas.operating import (
    HOSTILE,
    MODULE,
    NOBODY,
    Ask,
    Run,
    assert_harmless,
    bad,
    doubt,
    fine,
    finished,
    is_waiting,
    ran,
    started,
    view_of,
    waits,
)
from tests.saga_support import told


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
        (("--happened", "--result", '"many"', "--app", f"{MODULE}:doubt"), "The result of charge"),
        (("--happened", "--app", "no_such_module:x"), "cannot be loaded"),
    ):
        refused = run("resolve", saga_id, *arguments, "--why", "x")
        assert (refused.exit_code, words in refused.output) == (2, True), refused.output
    done = run("resolve", saga_id, "--happened", "--result", "5", "--why", "the bank says so", "--app", f"{MODULE}:ALL")
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


def test_it_is_a_command_of_somastack(ask: Ask, env: dict[str, str]) -> None:
    saga_id = started(ask, fine)
    done = CliRunner().invoke(somastack, ["saga", "list", "--all-tenants"], env=env)
    assert saga_id in done.output
    assert told(view_of(ask, saga_id).journal) == []
