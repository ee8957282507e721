"""What others wrote does nothing: markup in every field, huge values, broken bytes, senseless questions."""

from __future__ import annotations

import html
import json
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from soma_common.dlq.failures import Failure, Stage
from soma_common.dlq.models import RawRecord, sequence_of
from soma_common.dlq.store import DeadLetters, Undelivered
from soma_common.events.models import Event
from soma_common.inbox import Inbox, consumer_id
from tests.browser import browser
from tests.console_server import served
from tests.console_shop import PLACE_ORDER, Order, order
from tests.integration.console.conftest import World

# Each would set window.pwned, or close what it stands in.
MARKUP = [
    "<script>window.pwned=1</script>", "<img src=x onerror=window.pwned=1>", "\"><svg onload=window.pwned=1>",
    "' onmouseover='window.pwned=1", "</textarea><script>window.pwned=1</script>", "</pre></td><iframe srcdoc='<script>parent.pwned=1</script>'>",
    "javascript:window.pwned=1", "{{ 7*7 }}{% include 'x' %}", "${window.pwned=1}", "<!--", "]]>", "&lt;b&gt;",
    "\u202ereversed\u202c\u2066", "<a href='//evil.example'>x</a><base href='//evil.example'>",
]  # fmt: skip
ALL = " ".join(MARKUP)
IN_LETTER = """
UPDATE soma.dead_letters SET topic = $2, event_type = $2, tenant_id = 'acme', service_id = $2, error_type = left($2, 400),
    error_message = $2, error_stack = $2, fingerprint = left($2, 60), edited_by = $2, edited_at = now(),
    edited_value = convert_to($2, 'UTF8'), record_key = convert_to($2, 'UTF8'),
    header_names = ARRAY[convert_to($2, 'UTF8')], header_values = ARRAY[convert_to($2, 'UTF8')]
WHERE letter_id = $1
"""
IN_HISTORY = """
INSERT INTO soma.dead_letter_history (letter_id, at, who, what, why, value) VALUES ($1, now(), $2, $2, $2, convert_to($2, 'UTF8'))
"""
IN_EVENT = """
INSERT INTO soma.events SELECT soma.last_position() + 1000, xid, stream_id, version, key_hash, $1, tenant_id, $2, $2, $2, 1, $2, $2,
    $2, $2, trace_id, traceparent, $2, $2, timestamp, occurred_at, recorded_at, $3::json, $3::json
FROM soma.events ORDER BY position LIMIT 1
"""
IN_SAGA = "UPDATE soma.sagas SET saga_key = $2, correlation_id = $2, error = $2, error_type = $2, reason = $2, input = $3::json WHERE saga_id = $1"
IN_STEP = """
INSERT INTO soma.saga_steps (saga_id, number, step, what, attempt, at, epoch, result, error_type, error, stack, who, why)
SELECT $1, length + n, CASE n WHEN 1 THEN $2 ELSE '' END, CASE n WHEN 1 THEN 'failed' ELSE 'compensate' END, 1, now(), 1, $3::json,
       $2, $2, $2, CASE n WHEN 2 THEN $2 END, $2 FROM soma.sagas, generate_series(1, 2) n WHERE saga_id = $1
"""


async def poisoned(world: World) -> list[str]:
    """Markup in every text that the pages show; where these are."""
    pool, nasty = world.shop.pool, json.dumps({ALL: [ALL, {"x": ALL}]})
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    await pool.fetch(IN_LETTER, letter.letter_id, ALL)
    await pool.fetch(IN_HISTORY, letter.letter_id, ALL)
    event_id = uuid4()
    await pool.fetch(IN_EVENT, event_id, ALL[:500], nasty)
    saga = world.sagas["stuck"]
    await pool.fetch(IN_SAGA, saga, ALL[:400], nasty)
    await pool.fetch(IN_STEP, saga, ALL[:400], nasty)
    await pool.fetch("UPDATE soma.sagas SET length = length + 2 WHERE saga_id = $1", saga)
    await pool.fetch("INSERT INTO soma.consumers (name) VALUES ($1)", ALL)
    await pool.fetch(
        "INSERT INTO soma.saga_types VALUES (7, $1, 1, 'f', $2::json, '{}', now())", ALL, json.dumps([["step", ALL], ["timer", ALL]])
    )  # fmt: skip
    await pool.fetch("UPDATE soma.shards SET owner = $1, leased_until = now() + interval '1 hour'", ALL)
    (event,) = await world.shop.store.query(tenant_id="acme", event_id=event_id)
    quoted = str(httpx.QueryParams({"id": event.correlation_id}))
    name = str(httpx.QueryParams({"x": ALL}))[2:].replace("+", "%20")
    return [
        "/", "/letters", "/letters/found", f"/letters/{letter.letter_id}", f"/letters/{letter.letter_id}/edit", "/events",
        f"/events/{event_id}", f"/traces/{event.trace_id}", f"/correlation?{quoted}", "/sagas?status=all", f"/sagas/{saga}", "/readers",
        "/replays/new", "/definitions", f"/definitions/{name.replace('/', '%2F')}/1",
        f"/letters/found?{httpx.QueryParams({'event_type': ALL, 'tenant': ALL, 'error_type': ALL})}",
        f"/events?{httpx.QueryParams({'event_type': ALL, 'since': ALL})}", f"/nothing/{name}", f"/?{httpx.QueryParams({'said': ALL})}",
    ]  # fmt: skip


async def test_markup_in_every_field_is_text(world: World) -> None:
    for path in await poisoned(world):
        answer = await world.ann.get(path)
        assert answer.status_code in (200, 400, 404), (path, answer.status_code, answer.text[-500:])
        text = answer.text
        for bad in MARKUP[:6]:
            assert bad not in text, (path, bad)
        for steering in "\u202e\u202c\u2066":
            assert steering not in text, path
        assert "49" not in text or "{{ 7*7 }}" not in path


@pytest.mark.timeout(240)
async def test_markup_in_every_field_does_nothing_in_a_browser(world: World, soma_database: str) -> None:
    paths, trouble = await poisoned(world), list[str]()
    async with browser() as chromium:
        with served(soma_database) as console:
            page = await chromium.new_page()
            page.on("dialog", lambda dialog: trouble.append(dialog.message))
            page.on("console", lambda line: trouble.append(line.text) if "Content Security" in line.text else None)
            page.on(
                "request", lambda request: None if request.url.startswith(console.url) else trouble.append(request.url)
            )
            for path in paths:
                await page.goto(console.url + path)
                await page.evaluate("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
                assert await page.evaluate("window.pwned === undefined"), path
                assert await page.locator("main").count() == 1, path
                assert (
                    await page.evaluate("document.querySelectorAll('iframe, base, main script, object').length") == 0
                ), path
            await page.goto(console.url)  # what comes over the live connection is text, too
            await page.locator(".beat.on").wait_for()
            assert await page.evaluate("window.pwned === undefined")
    assert trouble == []


async def test_a_reason_with_markup_is_kept_as_it_is(world: World) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    page = await world.ann.done(f"/letters/{letter.letter_id}/retry", reason=ALL[:480])
    assert html.escape("<script>window.pwned=1</script>") in page
    assert "<script>window.pwned" not in page
    assert (await world.backend.letters("x").history(letter.letter_id))[-1].why == ALL[:480]
    too_long = await world.ann.send(f"/letters/{letter.letter_id}/discard", reason="x" * 501)
    assert too_long.status_code == 400


async def captured(world: World, value: bytes | None, **fields: Any) -> UUID:
    """The letter of a record with this value."""
    given: dict[str, Any] = {"topic": "t", "partition": 0, "offset": 1, "key": b"k"} | fields
    record = RawRecord(value=value, **given)
    number = await consumer_id(world.shop.pool, "billing")
    letters = DeadLetters(world.shop.pool, Inbox(number, 5.0), "test", consumer="billing")
    await letters.park(
        Undelivered(record=record, event=None, sequence=sequence_of(record)), Failure.of(Stage.DECODE, ValueError("bad")), attempts=1
    )  # fmt: skip
    return next(each.letter_id for each in await world.letters() if each.topic == given["topic"])


@pytest.mark.parametrize(
    "value",
    [b'{"a": "' + b"x" * 5_000_000 + b'"}', b"[" * 200_000, b'{"a":' * 900 + b"1" + b"}" * 900, b"\xff" * 3_000_000, b"\x00" * 70_000,
     "\u2028\ud7ff\u202e".encode() * 30_000, b"", None, b'{"n": 123456789012345678901234567890, "d": 1e999}', b'{"\xff": 1}'],
    ids=["long text", "deep", "nested", "bytes", "zeros", "separators", "empty", "null", "numbers", "broken"],
)  # fmt: skip
async def test_huge_and_broken_values_are_shown_in_part_and_whole_in_a_file(world: World, value: bytes | None) -> None:
    letter = await captured(world, value)
    page = await world.ann.get(f"/letters/{letter}")
    assert page.status_code == 200
    assert len(page.content) < 900_000
    assert (await world.ann.get(f"/letters/{letter}/value")).content == (value or b"")
    assert (await world.ann.get(f"/letters/{letter}/edit")).status_code == 200


async def test_numbers_stay_as_they_were_written(world: World) -> None:
    letter = await captured(world, b'{"n": 123456789012345678901234567890, "d": 1.10}')
    page = await world.ann.page(f"/letters/{letter}/edit")
    assert "123456789012345678901234567890" in page
    assert "1.10" in page


async def test_a_large_event_is_shown_in_part(world: World) -> None:
    big = order("big", note="y" * 800_000)
    await world.shop.publish([big])
    page = await world.ann.page(f"/events/{big.event_id}")
    assert "more characters" in page
    assert len(page) < 200_000
    assert len((await world.ann.get(f"/events/{big.event_id}/file")).content) > 800_000
    assert "A large payload" in await world.ann.page("/stream?tenant=acme&aggregate_type=order&aggregate_id=big")


async def test_a_long_chain_of_causes_is_drawn(world: World) -> None:
    cause, events = None, list[Event]()
    for n in range(290):
        event = order(f"chain-{n}", correlation_id="chain", causation_id=cause)
        cause = str(event.event_id)
        events.append(event)
    await world.shop.publish(events)
    assert (await world.ann.page("/correlation?id=chain")).count("<li ") == 290
    loop = order("loop", correlation_id="loop")
    await world.shop.publish(
        [order("loop2", correlation_id="loop", causation_id=str(loop.event_id), event_id=loop.event_id)]
    )
    assert (await world.ann.page("/correlation?id=loop")).count("<li ") == 1


@pytest.mark.parametrize(
    "path",
    [
        "/letters/found?status=nonsense", "/letters/found?cursor=-1", "/letters/found?cursor=9e9", "/letters/found?cursor=" + "9" * 40,
        "/letters/found?event_id=x", "/letters/found?trace_id=%00", "/letters/found?since=yesterday", "/letters/found?consumer=%00",
        "/letters/found?since=2026-99-99", "/letters/found?until=9999-12-31T23:59:59%2B00:00:00:00",
        "/events?cursor=x", "/events?cursor=99999999999999999999", "/events?event_id=1", "/events?trace_id=zz", "/events?tenant=%00",
        "/events?event_type=%00", "/events?since=0000-00-00", "/sagas?cursor=x", "/sagas?status=x",
        "/sagas?name=%00", "/sagas?since=10000-01-01", "/replays/new?consumer=none", "/replays/new?consumer=billing&mode=rebuild",
        "/replays/new?consumer=billing&mode=x", "/replays/new?consumer=billing&since=2027-01-01&until=2026-01-01", "/stream",
        "/stream?tenant=acme", "/stream?tenant=acme&aggregate_type=%00&aggregate_id=x", "/stream?tenant=acme&aggregate_type=a&aggregate_id=b&from=x",
        "/correlation", "/correlation?id=%00", "/redrive?status=x", "/redrive?since=x",
    ],
)  # fmt: skip
async def test_senseless_questions_get_an_answer_that_helps(world: World, path: str) -> None:
    answer = await world.ann.get(path)
    assert answer.status_code in (400, 404), (answer.status_code, answer.text[-400:])
    assert "Traceback" not in answer.text
    assert '<p class="under">' in answer.text


@pytest.mark.parametrize("part", ["x", "%00", "..", "1' OR '1'='1", "%ff", "a" * 3000, "0", "{}", "%2e%2e%2f"])
async def test_senseless_addresses_lead_nowhere(world: World, part: str) -> None:
    for base in (
        "/letters/",
        "/events/",
        "/sagas/",
        "/replays/",
        "/traces/",
        "/redrives/",
        "/live/sagas/",
        "/definitions/x/",
    ):
        answer = await world.ann.get(base + part)
        if ".." in part or "%2e" in part:  # the client, or the router, takes it for the page above
            assert answer.status_code in (200, 307, 404)
            continue
        assert answer.status_code in (400, 404), (base, answer.status_code)


async def test_senseless_forms_get_an_answer_that_helps(world: World) -> None:
    letter, saga = (await world.letters(statuses="dead", consumer="billing"))[0].letter_id, world.sagas["stuck"]
    for path, fields in (
        (f"/letters/{letter}/edit", {"value": "{}", "coding": "base64", "revision": "0"}), (f"/letters/{letter}/check", {}),
        (f"/letters/{letter}/edit", {"value": "x", "coding": "?", "revision": "a"}), (f"/sagas/{saga}/resolve", {"happened": "yes", "result": "{"}),
        ("/redrive", {"rate": "x"}), ("/redrive", {"rate": "-1"}), ("/redrive", {"rate": "nan"}), ("/redrive", {"failures": "9"}),
        ("/redrive", {"ahead": "1e99"}), ("/replays?consumer=billing", {"rate": "0"}), ("/replays?consumer=none", {}), ("/replays", {}),
    ):  # fmt: skip
        answer = await world.ann.send(path, reason="r", **fields)
        assert answer.status_code in (200, 400), (path, fields, answer.status_code)
        assert "Traceback" not in answer.text


async def test_an_error_of_ours_is_no_traceback(world: World, caplog: pytest.LogCaptureFixture) -> None:
    await world.shop.pool.fetch("ALTER TABLE soma.saga_types RENAME TO elsewhere")
    answer = await world.ann.get("/sagas")
    assert answer.status_code == 503
    assert "somastack db upgrade" in answer.text
    await world.shop.pool.fetch("ALTER TABLE soma.dead_letters ALTER COLUMN parked_at TYPE text")
    answer = await world.ann.get("/letters")
    assert answer.status_code == 500
    assert "Something failed in the console" in answer.text
    assert "asyncpg" not in answer.text
    assert "Traceback" not in answer.text
    assert "Page /letters failed" in caplog.text


async def test_a_database_that_is_away_is_a_page_with_a_cure(world: World) -> None:
    from soma_common.config import SomaConfig
    from soma_common.console.backend import open_backend
    from soma_common.console.serving import make_console
    from soma_common.console.settings import ConsoleSettings
    from tests.integration.console.conftest import Visitor

    dsn = "postgresql://ann:geheim@127.0.0.1:1/none"
    async with open_backend(SomaConfig(postgres_dsn=dsn), dsn, ConsoleSettings()) as backend:
        answer = await Visitor(make_console(ConsoleSettings(), backend)[1]).get("/")
    assert answer.status_code == 503
    assert "geheim" not in answer.text


async def test_a_saga_that_is_not_known_is_still_shown(world: World) -> None:
    saga = await world.shop.sagas.start_saga(PLACE_ORDER, Order(order_id="x", amount=1), tenant_id="acme")
    await world.shop.pool.fetch("UPDATE soma.sagas SET name = 'gone', version = 9 WHERE saga_id = $1", saga)
    assert "gone" in await world.ann.page(f"/sagas/{saga}")
