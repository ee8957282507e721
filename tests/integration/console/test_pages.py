"""What the pages of the console show, and what its verbs do, on a real database."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from urllib.parse import urlsplit
from uuid import uuid4

from soma_common.console.backend import open_backend
from soma_common.console.serving import make_console
from soma_common.console.settings import ConsoleSettings
from soma_common.dlq.failures import Stage
from soma_common.dlq.models import RawRecord, Status
from soma_common.postgres.migrate import upgrade
from soma_common.replay.models import ReplayState
from soma_common.sagas.models import SagaStatus
from soma_common.sagas.settings import SagaSettings
from tests.console_shop import OTHER, TENANT, drain, order
from tests.core_support import connected
from tests.integration.console.conftest import Visitor, World
from tests.waiting import until


def words(html: str) -> str:
    """A page as a person reads it."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


async def test_the_overview_tells_what_needs_somebody(world: World) -> None:
    text = words(await world.ann.page("/"))
    assert "6 dead letters wait for a person" in text
    assert "1 saga is stuck" in text
    assert "Nobody reads for consumer:billing" in text
    of_other = words(await world.ann.page(f"/?tenant={OTHER}"))
    assert "1 dead letter waits for a person" in of_other
    assert "stuck" in of_other
    assert "Nobody reads" not in of_other  # that is about all tenants


async def test_events_are_found_by_what_they_have_and_paged(world: World) -> None:
    assert words(await world.ann.page("/events?event_type=order.billed")).count("order.billed") >= 14
    await world.shop.publish([order(f"p-{n}") for n in range(120)])
    seen: list[str] = []
    path = f"/events?aggregate_type=order&event_type=order.placed&tenant={TENANT}"
    while path:
        text = await world.ann.page(path)
        seen += re.findall(r'<a href="/events/([0-9a-f-]{36})\?', text)
        found = re.search(r'rel="next" href="([^"]+)"', text)
        path = found[1].replace("&amp;", "&") if found else ""
    assert len(seen) == len(set(seen)) == 120 + 12 + 6
    oldest = await world.ann.page("/events?order=oldest")
    assert oldest.index("o-0") < oldest.index("o-1")


async def test_one_event_whole_and_as_a_file(world: World) -> None:
    (event,) = await world.shop.store.query(tenant_id=TENANT, aggregate_id="o-3", event_type="order.placed")
    text = words(await world.ann.page(f"/events/{event.event_id}"))
    for value in (event.event_id, event.correlation_id, event.trace_id, event.idempotency_key, "23"):
        assert str(value) in text
    file = await world.ann.get(f"/events/{event.event_id}/file")
    assert file.headers["content-disposition"].startswith("attachment")
    assert json.loads(file.content)["payload"] == {"order_id": "o-3", "amount": 23, "note": ""}


async def test_a_stream_in_order(world: World) -> None:
    text = words(await world.ann.page(f"/stream?tenant={TENANT}&aggregate_type=order&aggregate_id=o-3"))
    assert "at version 2" in text
    assert text.index("order.placed @1") < text.index("order.billed @2")
    await world.shop.publish([order("long", n) for n in range(1, 131)])
    first = await world.ann.page(f"/stream?tenant={TENANT}&aggregate_type=order&aggregate_id=long")
    assert first.count('aria-label="Version') == 100
    second = await world.ann.page(f"/stream?tenant={TENANT}&aggregate_type=order&aggregate_id=long&from=101")
    assert second.count('aria-label="Version') == 30


async def test_what_led_to_what(world: World) -> None:
    text = await world.ann.page("/correlation?id=checkout-o-3")
    assert re.findall(r'<li class="(\w+)"', text) == ["root", "d1"]  # billed, because it was placed
    saga = words(await world.ann.page("/correlation?id=checkout-s-1"))
    assert saga.index("place-order v2") < saga.index("reserve") < saga.index("mail") < saga.index("order.shipped")


async def test_a_trace_shows_events_failures_and_sagas_by_time(world: World) -> None:
    letter = (await world.letters(consumer="billing", statuses="dead"))[0]
    assert letter.event.trace_id is not None
    text = await world.ann.page(f"/traces/{letter.event.trace_id.hex}")
    assert "bar-wrong" in text
    assert "dead at billing" in text
    view = await world.shop.sagas.get_saga(world.sagas["completed"])
    of_saga = await world.ann.page(f"/traces/{view.trace_id}?correlation={view.correlation_id}")
    assert of_saga.count('class="bar-step"') == len({entry.step for entry in view.journal if entry.step})


async def test_letters_by_kind_and_one_by_one(world: World) -> None:
    text = words(await world.ann.page("/letters"))
    assert "5 ValueError" in text
    assert "2 waits behind another" in text
    (letter, *_) = await world.letters(statuses="dead", consumer="billing")
    page = await world.ann.page(f"/letters/{letter.letter_id}")
    for part in ("ValueError", "has no amount", "Traceback", "consumer:billing", str(letter.event.event_id), "amount"):
        assert part in page
    raw = await world.ann.get(f"/letters/{letter.letter_id}/value")
    assert raw.headers["content-type"] == "application/octet-stream"
    assert json.loads(raw.content)["payload"]["amount"] is None


async def test_a_letter_is_retried_with_its_sequence_and_a_reason(world: World) -> None:
    letter = next(each for each in await world.letters(statuses="dead") if each.sequence.endswith(b"o-100"))
    assert "The running consumer" in await world.ann.page(f"/letters/{letter.letter_id}")
    answer = await world.ann.send(f"/letters/{letter.letter_id}/retry", reason=" ")
    assert answer.status_code == 400
    assert "Another try is asked for" in await world.ann.done(f"/letters/{letter.letter_id}/retry", reason="a try")
    (entry,) = [e for e in await world.backend.letters("x").history(letter.letter_id) if e.what == "redriving"]
    assert entry.why == "a try"
    assert entry.who.endswith("(console)")
    assert "Nothing to do" in await world.ann.done(f"/letters/{letter.letter_id}/retry", reason="again")


async def test_a_letter_is_mended_and_resolved(world: World) -> None:
    letter = next(each for each in await world.letters(statuses="dead") if each.sequence.endswith(b"o-100"))
    base = f"/letters/{letter.letter_id}"
    form = await world.ann.page(f"{base}/edit")
    text = form.partition('rows="24">\n')[2].partition("</textarea>")[0].replace("&#34;", '"')
    checked = await world.ann.send(f"{base}/check", value=text.replace('"amount": null', '"amount": 77'), coding="text")
    assert "Its payload fits OrderPlaced" in checked.text
    assert "2 letters of its sequence would be tried" in words(checked.text)
    mended = text.replace('"amount": null', '"amount": 77')
    said = await world.ann.done(
        f"{base}/edit", value=mended, coding="text", revision="0", then="retry", reason="the form lost it"
    )
    assert "revision 1" in said
    await drain(world.shop)
    assert [each.status for each in await world.letters() if each.sequence == letter.sequence] == [Status.RESOLVED] * 2
    assert await world.shop.pool.fetch("SELECT amount FROM bills WHERE order_id = 'o-100' ORDER BY amount") == [
        (55,),
        (77,),
    ]
    text = words(await world.ann.page(base))
    assert "the form lost it" in text
    assert "resolved" in text


async def test_an_edit_is_checked_before_it_counts(world: World) -> None:
    letter = next(each for each in await world.letters(statuses="dead") if each.sequence.endswith(b"o-102"))
    base, full = f"/letters/{letter.letter_id}", await world.backend.letters("x").show(letter.letter_id)
    value = json.loads(full.value or b"")
    wrong = json.dumps(value | {"payload": {"order_id": 7}})
    page = await world.ann.send(f"{base}/check", value=wrong, coding="text")
    assert "does not fit its schema" in page.text
    assert "Save and retry" not in page.text
    for bad, why in ((wrong, "does not fit"), ("{", "not JSON")):
        answer = await world.ann.send(f"{base}/edit", value=bad, coding="text", revision="0", reason="r")
        assert answer.status_code == 400
        assert why in answer.text
    other = json.dumps(value | {"tenant_id": "else", "payload": value["payload"] | {"amount": 1}})
    assert "another event now: tenant_id" in (await world.ann.send(f"{base}/check", value=other, coding="text")).text
    fine = json.dumps(value | {"payload": value["payload"] | {"amount": 5}})
    stale = await world.ann.send(f"{base}/edit", value=fine, coding="text", revision="3", reason="r")
    assert stale.status_code == 409
    assert (await world.letters(event_id=letter.event.event_id))[0].revision == 0


async def test_a_letter_is_given_up(world: World) -> None:
    letter = next(each for each in await world.letters(statuses="dead") if each.sequence.endswith(b"o-101"))
    said = await world.ann.done(f"/letters/{letter.letter_id}/discard", reason="nobody ordered it")
    assert "given up" in said
    await drain(world.shop)
    assert await world.shop.pool.fetch("SELECT amount FROM bills WHERE order_id = 'o-101'") == [(56,)]


async def test_many_letters_are_re_driven_with_their_progress(world: World) -> None:
    assert "5 dead or retrying letters" in words(await world.ann.page("/redrive?consumer=billing"))
    answer = await world.ann.send("/redrive?consumer=billing", reason="the price list is back", ahead="3", failures="2")
    path = answer.headers["location"].partition("?")[0]
    worker = asyncio.create_task(_keep_billing(world))
    try:

        async def ended() -> bool:
            return "ended" in words(await world.ann.page(path))

        await until(ended)
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
    text = words(await world.ann.page(path))
    assert re.search(r"failed again 5 ", text), text
    assert "the price list is back" in text
    assert "the price list is back" in words(await world.ann.page("/redrives"))


async def _keep_billing(world: World) -> None:
    async with world.shop.consumer("billing"):
        await asyncio.sleep(60)


async def test_a_re_drive_can_be_stopped(world: World) -> None:
    answer = await world.ann.send("/redrive", reason="all of them")
    path = answer.headers["location"].partition("?")[0]
    assert "It was stopped" in await world.ann.done(f"{path}/stop", reason="a mistake")
    text = words(await world.ann.page(path))
    assert "stopped ended" in text, text


async def test_sagas_their_timeline_and_graph(world: World) -> None:
    text = words(await world.ann.page("/sagas"))
    assert "at mail" in text
    assert text.count("place-order v2") == 1  # those that ended are not listed
    page = await world.ann.page(f"/sagas/{world.sagas['stuck']}")
    assert "there is no address to write to" in page
    assert re.search(r'<rect class="shape failed"', page)  # the step in the graph
    assert "undo: refund" in page
    compensated = words(await world.ann.page(f"/sagas/{world.sagas['compensated']}"))
    assert "turns around because of pay" in compensated


async def test_a_stuck_saga_is_helped(world: World) -> None:
    base = f"/sagas/{world.sagas['stuck']}"
    assert (await world.ann.send(f"{base}/skip", reason="")).status_code == 400
    assert "tried again" in await world.ann.done(f"{base}/retry", reason="the address is known now")
    async with world.shop.saga_worker(settings=SagaSettings()):
        await until(lambda: _is(world, SagaStatus.STUCK))
        said = await world.ann.done(f"{base}/resolve", reason="written by hand", happened="yes", result="null")
        assert "It is said that it happened" in said
        await until(lambda: _is(world, SagaStatus.COMPLETED))
    view = await world.shop.sagas.get_saga(world.sagas["stuck"])
    told = [(entry.who, entry.why) for entry in view.journal if entry.who]
    assert [why for _, why in told] == ["the address is known now", "written by hand"]
    assert all(who is not None and who.endswith("(console)") for who, _ in told)
    refused = await world.ann.send(f"{base}/compensate", reason="too late")
    assert refused.status_code == 409
    assert (await world.ann.send(f"{base}/explode", reason="why not")).status_code == 404


async def _is(world: World, status: SagaStatus) -> bool:
    return (await world.shop.sagas.get_saga(world.sagas["stuck"])).status is status


async def test_replays_are_planned_begun_paused_and_ended(world: World) -> None:
    await world.shop.pool.fetch(
        "DELETE FROM soma.inbox WHERE event_id IN (SELECT event_id FROM soma.events WHERE position <= 3)"
    )
    await world.shop.pool.fetch("TRUNCATE bills")
    path = f"/replays/new?consumer=billing&mode=missing&event_type=order.placed&tenant={TENANT}"
    plan = words(await world.ann.page(path))
    assert "18 events, 15 of them known to billing" in plan
    start = path.replace("/replays/new", "/replays")
    assert (await world.ann.send(start, reason="")).status_code == 400
    answer = await world.ann.send(start, reason="rows were lost")
    run = answer.headers["location"].split("/")[2].partition("?")[0]

    async def ended() -> bool:
        return (await world.backend.runs.find(run)).state is ReplayState.DONE

    await until(ended)
    found = await world.backend.runs.find(run)
    assert (found.counts.applied, found.reason) == (3, "rows were lost")
    assert found.requested_by.endswith("(console)")
    assert await world.shop.pool.fetch("SELECT count(*) FROM bills") == [(3,)]
    assert "rows were lost" in words(await world.ann.page(f"/replays/{run}"))
    slow = await world.ann.send(start.replace("missing", "force") + "&aggregate_id=o-5", reason="again", rate="0.01")
    run = slow.headers["location"].split("/")[2].partition("?")[0]
    for verb, state in (("pause", ReplayState.PAUSED), ("cancel", ReplayState.CANCELLED)):
        if (await world.backend.runs.find(run)).state is ReplayState.DONE:
            break
        await world.ann.done(f"/replays/{run}/{verb}", reason="enough")
        assert (await world.backend.runs.find(run)).state is state


async def test_consumers_and_their_shards(world: World) -> None:
    async with world.shop.consumer("billing"):

        async def owned() -> bool:
            text = words(await world.ann.page("/readers"))
            return "1 worker" in text and "8 of 8 shards owned" in text

        await until(owned)


async def test_what_cannot_be_decoded_is_shown_byte_by_byte(world: World) -> None:
    value = b"\x00\x01\xff" + bytes(range(256)) * 40
    record = RawRecord(
        topic="t", partition=3, offset=9, key=b"\xff\xfe", value=value, headers=(("h", b"\x80"), ("n", None))
    )
    handler = world.backend.letters("test")
    await handler.capture_failed_event("billing", record, ValueError("broken"), stage=Stage.DECODE)
    (letter,) = [each for each in await world.letters() if each.topic == "t"]
    page = await world.ann.page(f"/letters/{letter.letter_id}")
    assert "00 01 ff 00 01 02" in page
    assert "10,243 bytes, no text" in words(page)
    assert (await world.ann.get(f"/letters/{letter.letter_id}/value")).content == value
    form = await world.ann.page(f"/letters/{letter.letter_id}/edit")
    assert "as base64" in form


async def test_pages_without_anything_say_so(world: World) -> None:
    for path, told in (
        ("/events?event_type=nothing.such", "No event matches"), ("/letters/found?fingerprint=none", "No letter matches"),
        ("/sagas?saga_key=none&status=all", "No saga matches"), ("/redrives", "None yet"), ("/replays", "No replay yet"),
        ("/letters?tenant=nobody", "Nothing is dead"), ("/?tenant=nobody", "Nothing does"),
    ):  # fmt: skip
        assert told in await world.ann.page(path), path
    assert (await world.ann.get(f"/traces/{uuid4().hex}")).status_code == 404


async def test_times_are_asked_for_in_utc(world: World) -> None:
    now = f"{datetime.now(UTC):%Y-%m-%d}"
    assert "order.placed" in await world.ann.page(f"/events?since={now}")
    assert "No event matches" in await world.ann.page(f"/events?until={now}T00:00")
    assert "No letter matches" in await world.ann.page(f"/letters/found?until={now}T00:00Z")


async def test_of_many_kinds_the_largest_are_shown(world: World) -> None:
    await world.shop.pool.fetch(
        "UPDATE soma.dead_letters SET fingerprint = 'z' WHERE letter_id IN (SELECT letter_id FROM soma.dead_letters LIMIT 3)"
    )
    copy = (
        "INSERT INTO soma.dead_letters SELECT (jsonb_populate_record(l, jsonb_build_object('letter_id', gen_random_uuid(),"
        " 'record_offset', 1000 + n, 'place', 100000 + n, 'fingerprint', 'a' || n))).* FROM soma.dead_letters l,"
        " generate_series(1, 150) n WHERE l.record_offset = 14"
    )
    await world.shop.pool.fetch(copy.replace("SELECT (jsonb", "OVERRIDING SYSTEM VALUE SELECT (jsonb"))
    text = words(await world.ann.page("/letters"))
    assert "more kinds, of fewer letters each" in text
    assert text.count("newest · re-drive") <= 100
    assert text.index("· z ") < text.index("· a1")  # three of one kind go before one each


async def test_the_rights_of_an_application_are_enough(world: World) -> None:
    dsn, role = world.shop.config.postgres_dsn, f"console_{uuid4().hex[:8]}"
    async with connected(dsn) as admin:
        await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'x'")
        try:
            await upgrade(dsn, grant_to=role)
            parts = urlsplit(dsn)
            theirs = parts._replace(netloc=f"{role}:x@{parts.netloc.rpartition('@')[2]}").geturl()
            async with open_backend(world.shop.config, theirs, ConsoleSettings()) as backend:
                console, app = make_console(ConsoleSettings(), backend)
                bob = Visitor(app)
                letter = (await world.letters(statuses="dead", consumer="billing"))[0]
                base, saga = f"/letters/{letter.letter_id}", f"/sagas/{world.sagas['stuck']}"
                for path in (
                    "/",
                    "/events",
                    "/letters",
                    base,
                    "/sagas?status=all",
                    saga,
                    "/readers",
                    "/replays",
                    "/redrive",
                ):
                    await bob.page(path)
                assert "Another try is asked for" in await bob.done(f"{base}/retry", reason="r")
                assert "tried again" in await bob.done(f"{saga}/retry", reason="r")
                assert "recorded" in await bob.done("/replays?consumer=billing", reason="r")
                await console.close()
        finally:
            await admin.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


async def test_relays_and_consumers_of_kafka(world: World) -> None:
    pool = world.shop.pool
    await pool.fetch("INSERT INTO soma.consumers (name) VALUES ('mailing')")
    await pool.fetch(
        "INSERT INTO soma.consumer_offsets (consumer_id, topic, partition, next_offset, epoch, moved_at)"
        " SELECT consumer_id, 'soma.shop.events', n, 1000 + n, 3, now() FROM soma.consumers, generate_series(0, 5) n WHERE name = 'mailing'"
    )
    await pool.fetch("INSERT INTO soma.shards (reader, shard) SELECT 'relay:shop', n FROM generate_series(0, 7) n")
    await pool.fetch(
        "INSERT INTO soma.relay_topics (reader, topic, partitions) VALUES ('relay:shop', 'soma.shop.events', 6)"
    )
    text = words(await world.ann.page("/readers"))
    assert "mailing over Kafka" in text
    assert "soma.shop.events 5 1,005 3" in text
    assert "0 of 8 groups owned" in text
    assert "relay:shop soma.shop.events 6" in text
    assert "Nobody reads for relay:shop" in words(await world.ann.page("/"))
