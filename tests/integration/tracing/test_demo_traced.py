"""The trace of the demo, sent to a real collector: of its events, and of the trip that fails on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.collector_server import SentSpan, collector, tree

ROOT = Path(__file__).parents[3]
WEEK = ROOT / "examples" / "data" / "flights-2013-02-04.csv"
ROWS = 60


@pytest.mark.parametrize("mode", ["standalone", "somastack"])
def test_the_demo_shows_what_it_does(mode: str, tmp_path: Path) -> None:
    few = tmp_path / "few.csv"
    few.write_text("\n".join(WEEK.read_text().splitlines()[: ROWS + 1]) + "\n")
    with collector(tmp_path) as receiver:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA", "OTEL"))}
        done = subprocess.run(
            [sys.executable, "-m", "examples.flights", "demo", "--kills", "0", "--csv", str(few), "--mode", mode],
            cwd=ROOT, env=clean | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint, "PYTHONPATH": path()},
            capture_output=True, text=True, timeout=170,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
    spans = receiver.spans  # all of its processes have ended, and sent what they had
    (start,) = [span for span in spans if span.name == "start book-trip"]
    assert tree(receiver.of(start.trace_id)) == [
        "start book-trip [internal, flights-demo]",
        "  book-trip hold-room [internal, flights-demo]",
        "  book-trip pay [internal, flights-demo]",
        "  book-trip take-seat [internal, flights-demo]",
        "  book-trip undo hold-room [internal, flights-demo]",
        "  book-trip undo take-seat [internal, flights-demo]",
    ]
    assert [span.name for span in spans if span.error] == ["book-trip pay"]

    by_id = {(span.trace_id, span.span_id): span for span in spans}
    processed = [span for span in spans if span.kind == "consumer"]
    events = {span.attributes["messaging.message.id"] for span in processed}
    assert len(events) == 2 * ROWS - sum("NA" in row.split(",")[4:8] for row in few.read_text().splitlines()[1:])
    for span in processed:
        append = parent(span, by_id)
        assert (append.kind, append.service) == ("producer", "flights-demo")
        assert append.name.partition(" ")[2] == span.name.partition(" ")[2]
    sends = [span for span in spans if span.name.startswith("send ")]
    assert {span.service for span in sends} == ({"flights-relay"} if mode == "somastack" else set())
    if mode == "somastack":
        assert sum(span.attributes["messaging.batch.message_count"] for span in sends) == len(events)


def parent(span: SentSpan, by_id: dict[tuple[str, str], SentSpan]) -> SentSpan:
    return by_id[span.trace_id, span.parent_id]


def path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
