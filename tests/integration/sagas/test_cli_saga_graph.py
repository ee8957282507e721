"""``somastack saga graph``."""

from __future__ import annotations

from pathlib import Path

import pytest

from soma_common import Soma, SomaConfig
from tests.integration.sagas.operating import (
    ALL,
    Ask,
    Run,
    is_waiting,
    ran,
    waits,
)


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
