"""Who gets in, what they may do there, and which requests are answered at all."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from soma_common.console.security import MOST_FORM, POLICY
from soma_common.console.settings import ConsoleSettings
from tests.console_shop import OTHER, TENANT
from tests.integration.console.conftest import HOME, Visitor, World

TOKEN, LOOK = "operator-token-0123456789", "viewer-token-0123456789ab"
TOKENS: dict[str, Any] = {"token": TOKEN, "viewer_token": LOOK}
PROXY: dict[str, Any] = {
    "proxies": ("10.1.0.0/16",), "operators": ("ops",), "viewers": ("staff", "ops"), "tenants_header": "X-Tenants",
}  # fmt: skip


async def of_proxy(world: World, **headers: str) -> Visitor:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return world.visitor(ConsoleSettings(**PROXY), peer="10.1.2.3", headers=given)


async def signed_in(world: World, token: str, name: str = "Ann") -> Visitor:
    visitor = world.visitor(ConsoleSettings(**TOKENS))
    answer = await visitor.send("/sign-in", name=name, token=token, next="/letters")
    assert (answer.status_code, answer.headers["location"]) == (303, "/letters")
    return visitor


async def test_every_answer_carries_careful_headers(world: World) -> None:
    for path in ("/", "/nothing", "/static/console.css", "/static/nothing.css", "/events?limit=x", "/healthz"):
        headers = (await world.ann.get(path)).headers
        assert headers["content-security-policy"] == POLICY, path
        assert (headers["x-content-type-options"], headers["x-frame-options"]) == ("nosniff", "DENY"), path
    assert (await world.ann.get("/")).headers["cache-control"] == "no-store"


async def test_nothing_in_a_page_is_inline(world: World) -> None:
    letter = (await world.letters(statuses="dead"))[0]
    for path in (
        "/",
        "/events",
        "/letters",
        f"/letters/{letter.letter_id}",
        f"/sagas/{world.sagas['stuck']}",
        "/readers",
    ):
        page = await world.ann.page(path)
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son\w+=|javascript:", page), path


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8790", "localhost.evil:8790", "", "[::2]:8790"]
)
async def test_names_that_lead_here_are_not_ours(world: World, host: str) -> None:
    for path in ("/", "/static/console.css", "/healthz", "/sign-in"):
        assert (await world.ann.get(path, headers={"host": host})).status_code == 421, path
    for name in ("localhost:8790", "127.0.0.1", "[::1]:8790", "LOCALHOST"):
        assert (await world.ann.get("/", headers={"host": name})).status_code == 200


@pytest.mark.parametrize(
    ("origin", "site", "status"),
    [
        (HOME, "same-origin", 303), ("http://evil.example", "cross-site", 403), ("http://localhost:8790", None, 403),
        ("http://127.0.0.1:9999", "same-site", 403), ("null", None, 403), (HOME, "cross-site", 403), (None, None, 403),
    ],
)  # fmt: skip
async def test_forms_of_other_sites_are_refused(
    world: World, origin: str | None, site: str | None, status: int
) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    headers = {name: value for name, value in (("origin", origin), ("sec-fetch-site", site)) if value is not None}
    data = {"csrf": await world.ann.csrf(), "reason": "r"}
    answer = await world.ann.http.post(f"/letters/{letter.letter_id}/retry", data=data, headers=headers)
    assert answer.status_code == status


async def test_forms_that_nobody_gave_out_are_refused(world: World) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    path = f"/letters/{letter.letter_id}/retry"
    bob = Visitor(world.app)
    for token in ("", "0" * 64, "ü", await bob.csrf()):  # that one is somebody else's
        assert (await world.ann.send(path, csrf=token or "x", reason="r")).status_code == 403
    bare = Visitor(world.app)
    answer = await bare.http.post(path, data={"reason": "r", "csrf": await world.ann.csrf()}, headers={"origin": HOME})
    assert answer.status_code == 403
    assert (await world.letters(event_id=letter.event.event_id))[0].status == "dead"


async def test_bodies_have_bounds(world: World) -> None:
    token, headers = await world.ann.csrf(), {"origin": HOME, "content-type": "application/x-www-form-urlencoded"}

    async def post(body: bytes, **more: str) -> int:
        return (await world.ann.http.post("/theme", content=body, headers=headers | more)).status_code

    assert await post(f"csrf={token}&theme=dark".encode()) == 303
    assert await post(b"a=" + b"x" * MOST_FORM) == 413
    assert await post(b"&".join(b"a%d=1" % n for n in range(300))) == 400
    assert await post(b"a=%ff%fe") == 400
    assert await post(b"a=\xff") == 400
    assert await post(b"{}", **{"content-type": "application/json"}) == 415
    assert await post(b"", **{"content-type": "multipart/form-data; boundary=x"}) == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND"])
async def test_other_ways_to_ask_are_refused(world: World, method: str) -> None:
    assert (await world.ann.http.request(method, "/letters")).status_code == 405


async def test_a_form_is_not_a_page_nor_the_other_way_round(world: World) -> None:
    letter = (await world.letters())[0]
    assert (await world.ann.get(f"/letters/{letter.letter_id}/retry")).status_code == 405
    assert (await world.ann.send("/events", reason="r")).status_code == 405


@pytest.mark.parametrize(
    "path",
    ["/static/../web.py", "/static/..%2fweb.py", "/static/%2e%2e/templates/base.html", "/static//etc/passwd", "/static/",
     "/static/..%5cweb.py", "/static/%00", "/static/console.css/../../web.py"],
)  # fmt: skip
async def test_static_files_are_those_of_the_folder(world: World, path: str) -> None:
    answer = await world.ann.get(path)
    assert answer.status_code in (404, 405)
    assert "import" not in answer.text


async def test_without_a_token_nothing_is_shown(world: World) -> None:
    bob = world.visitor(ConsoleSettings(**TOKENS))
    answer = await bob.get("/letters/found?status=dead")
    assert answer.status_code == 303
    assert answer.headers["location"] == "/sign-in?next=%2Fletters%2Ffound%3Fstatus%3Ddead"
    assert (await bob.get("/live/overview")).status_code == 401
    assert (await bob.get("/", headers={"authorization": "Bearer wrong"})).status_code == 401
    assert (await bob.get("/", headers={"cookie": "soma_session=W10=.00"})).status_code == 303
    letter = (await world.letters())[0]
    assert (await bob.send(f"/letters/{letter.letter_id}/retry", reason="r")).status_code == 401
    assert (await bob.get("/static/console.css")).status_code == 200


async def test_tokens_let_operators_and_viewers_in(world: World) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    look, path = await signed_in(world, LOOK), f"/letters/{letter.letter_id}"
    page = await look.page(path)
    assert "viewer" in page
    assert "Retry…" not in page
    for verb in ("retry", "discard", "edit", "check"):
        assert (await look.send(f"{path}/{verb}", reason="r")).status_code == 403
    assert (await look.send("/redrive", reason="r")).status_code == 403
    act = await signed_in(world, TOKEN, "Ann\n<b>")
    assert (await act.send(f"{path}/retry", reason="r")).status_code == 303
    entry = (await world.backend.letters("x").history(letter.letter_id))[-1]
    assert entry.who == "Ann<b> (console, by token)"


async def test_wrong_tokens_and_forged_sessions(world: World) -> None:
    bob = world.visitor(ConsoleSettings(**TOKENS))
    for token in ("", "wrong", TOKEN[:-1], TOKEN + "x", "ü" * 30):
        assert (await bob.send("/sign-in", name="Bob", token=token)).status_code == 403
    assert (await bob.send("/sign-in", name=" ", token=TOKEN)).status_code == 403
    good = await signed_in(world, LOOK)
    session = good.http.cookies["soma_session"]
    value, _, mac = session.partition(".")
    for forged in (f"{value}x.{mac}", f"{value}.{mac[:-1]}0", value, f".{mac}", "."):
        assert (await bob.get("/", headers={"cookie": f"soma_session={forged}"})).status_code == 303
    old = await signed_in(world, LOOK)  # of another console
    assert (
        await bob.get("/", headers={"cookie": f"soma_session={old.http.cookies['soma_session']}"})
    ).status_code == 303


async def test_a_session_ends(world: World) -> None:
    bob = world.visitor(ConsoleSettings(session_hours=0.001, **TOKENS))
    await bob.send("/sign-in", name="Bob", token=TOKEN)
    assert (await bob.get("/")).status_code == 200
    answer = await bob.send("/sign-out")
    assert answer.headers["location"] == "/sign-in"
    assert (await bob.get("/")).status_code == 303


async def test_cookies_are_kept_from_scripts_and_other_sites(world: World) -> None:
    bob = world.visitor(ConsoleSettings(**TOKENS), base="https://127.0.0.1:8790")
    answer = await bob.http.post(
        "/sign-in",
        data={"csrf": await bob.csrf(), "name": "Bob", "token": TOKEN},
        headers={"origin": "https://127.0.0.1:8790"},
    )
    for kept in answer.headers.get_list("set-cookie"):
        assert all(word in kept for word in ("HttpOnly", "SameSite=Strict", "Path=/", "Secure"))


@pytest.mark.parametrize(
    "to", ["https://evil.example", "//evil.example", "/\\evil.example", "javascript:alert(1)", "evil", "/\n/x"]
)
async def test_signing_in_leads_nowhere_else(world: World, to: str) -> None:
    bob = world.visitor(ConsoleSettings(**TOKENS))
    answer = await bob.send("/sign-in", name="Bob", token=TOKEN, next=to)
    assert answer.headers["location"] == "/"
    assert (await bob.send("/theme", theme="dark", back=to)).headers["location"] == "/"


async def test_who_comes_by_a_link_from_elsewhere_goes_on(world: World) -> None:
    good = await signed_in(world, LOOK)
    csrf, visit = await good.csrf(), good.http.cookies["soma_visit"]
    good.http.cookies.clear()  # of the cookies that are strict
    strange = {"sec-fetch-site": "cross-site", "cookie": f"soma_visit={visit}"}
    page = await good.get("/sign-in?next=/letters", headers=strange)
    assert '<a href="/letters">Go on</a>' in page.text
    assert csrf in page.text  # the same visitor: forms that are open stay good


async def test_a_bearer_acts_without_a_form_of_ours(world: World) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    robot = world.visitor(ConsoleSettings(**TOKENS), headers={"authorization": f"Bearer {TOKEN}"})
    answer = await robot.http.post(f"/letters/{letter.letter_id}/retry", data={"reason": "by a script"})
    assert answer.status_code == 303
    basic = {"authorization": "Basic YTpi"}  # a browser adds that by itself
    assert (
        await world.ann.http.post(f"/letters/{letter.letter_id}/retry", data={"reason": "r"}, headers=basic)
    ).status_code == 403
    evil = await robot.http.post(
        f"/letters/{letter.letter_id}/retry", data={"reason": "r"}, headers={"origin": "http://evil.example"}
    )
    assert evil.status_code == 403


async def test_a_proxy_says_who_it_is_and_nobody_else(world: World) -> None:
    ann = await of_proxy(world, x_forwarded_user="ann", x_forwarded_groups="x, ops", x_tenants="*")
    assert "ann · operator" in await ann.page("/")
    bob = await of_proxy(world, x_forwarded_user="bob", x_forwarded_groups="staff", x_tenants="*")
    assert "bob · viewer" in await bob.page("/")
    for headers in ({"x_forwarded_user": "eve", "x_forwarded_groups": "guests"}, {"x_forwarded_groups": "ops"}, {}):
        assert (await (await of_proxy(world, **headers)).get("/")).status_code == 401
    forged = {"x-forwarded-user": "ann", "x-forwarded-groups": "ops", "x-tenants": "*"}
    eve = world.visitor(ConsoleSettings(**PROXY), peer="10.2.0.1", headers=forged)
    assert (await eve.get("/")).status_code == 401
    local = world.visitor(ConsoleSettings(**PROXY), headers=forged)
    assert (await local.get("/")).status_code == 401


async def test_of_other_tenants_nothing_is_seen(world: World) -> None:
    ann = await of_proxy(world, x_forwarded_user="ann", x_forwarded_groups="ops", x_tenants=TENANT)
    theirs = next(letter for letter in await world.letters() if letter.event.tenant_id == OTHER)
    unknown = "00000000-0000-7000-8000-000000000000"
    for path in ("/letters/{}", "/letters/{}/value", "/letters/{}/edit"):
        answer = await ann.get(path.format(theirs.letter_id))
        assert answer.status_code == 404
        assert answer.text.replace(str(theirs.letter_id), unknown) == (await ann.get(path.format(unknown))).text
    for verb in ("retry", "discard", "edit", "check"):
        assert (await ann.send(f"/letters/{theirs.letter_id}/{verb}", reason="r", value="{}")).status_code == 404
    for path in ("/sagas/{}", "/live/sagas/{}", "/sagas/{}/file"):
        assert (await ann.get(path.format(world.sagas["other"]))).status_code == 404
    assert (await ann.send(f"/sagas/{world.sagas['other']}/cancel", reason="r")).status_code == 404
    assert (await ann.get(f"/events/{theirs.event.event_id}")).status_code == 404
    assert theirs.event.trace_id is not None
    assert (await ann.get(f"/traces/{theirs.event.trace_id.hex}")).status_code == 404
    assert (await ann.get("/correlation?id=checkout-g-1")).status_code == 404
    for path in ("/", "/events", "/letters", "/letters/found", "/sagas?status=all", "/replays", "/redrive"):
        page = await ann.page(path)
        assert OTHER not in page
        assert "g-1" not in page
        assert (await ann.get(f"{path}{'&' if '?' in path else '?'}tenant={OTHER}")).status_code == 403, path
    assert "5 dead letters" in await ann.page("/")  # of their own: 4, and a saga's
    assert "<strong>4</strong> dead or retrying" in await ann.page("/redrive?consumer=billing")
    for path in ("/readers", "/definitions"):
        assert (await ann.get(path)).status_code == 403
    none = await of_proxy(world, x_forwarded_user="ann", x_forwarded_groups="ops")
    assert (await none.get("/letters")).status_code == 403


async def test_of_several_tenants_one_is_chosen(world: World) -> None:
    ann = await of_proxy(world, x_forwarded_user="ann", x_forwarded_groups="ops", x_tenants=f"{TENANT},{OTHER}")
    assert "g-1" not in await ann.page("/letters/found")
    assert "g-1" in await ann.page(f"/letters/found?tenant={OTHER}")
    assert (await ann.get("/letters?tenant=third")).status_code == 403


async def test_a_tenants_operator_cannot_reach_others_by_an_edit_or_a_sequence(world: World) -> None:
    ann = await of_proxy(world, x_forwarded_user="ann", x_forwarded_groups="ops", x_tenants=TENANT)
    mine = next(each for each in await world.letters(statuses="dead") if each.sequence.endswith(b"o-102"))
    value = (await world.backend.letters("x").show(mine.letter_id)).value or b""
    turned = value.decode().replace(f'"tenant_id":"{TENANT}"', f'"tenant_id":"{OTHER}"').replace("null}", "1}")
    page = await ann.send(f"/letters/{mine.letter_id}/check", value=turned, coding="text")
    assert "another tenant" in page.text
    form = {"coding": "text", "revision": "0", "reason": "r"}
    assert (await ann.send(f"/letters/{mine.letter_id}/edit", value=turned, **form)).status_code == 400
    assert (await ann.send(f"/letters/{mine.letter_id}/edit", value='{"x": 1}', **form)).status_code == 400
    theirs = next(letter for letter in await world.letters() if letter.event.tenant_id == OTHER)
    # As a consumer that orders by partitions would have parked them: in one sequence.
    await world.shop.pool.fetch(
        "UPDATE soma.dead_letters SET sequence = $1 WHERE letter_id = $2", mine.sequence, theirs.letter_id
    )
    for path in (f"/letters/{mine.letter_id}/retry", "/redrive"):
        answer = await ann.send(path, reason="r")
        assert answer.status_code == 403
        assert "other tenants" in answer.text
    assert OTHER not in await ann.page(f"/letters/{mine.letter_id}")
    assert str(theirs.letter_id) not in await ann.page(f"/letters/{mine.letter_id}")


async def test_settings_bound_the_tenants_of_everybody(world: World) -> None:
    ann = world.visitor(ConsoleSettings(tenants=(TENANT,)))
    assert "g-1" not in await ann.page("/letters/found")
    theirs = next(letter for letter in await world.letters() if letter.event.tenant_id == OTHER)
    assert (await ann.get(f"/letters/{theirs.letter_id}")).status_code == 404


async def test_every_verb_leaves_a_line_in_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    letter = (await world.letters(statuses="dead", consumer="billing"))[0]
    with caplog.at_level(logging.INFO, "soma_common.console.audit"):
        await world.ann.done(f"/letters/{letter.letter_id}/retry", reason="because\nof")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "soma_common.console.audit"]
    assert line.startswith("letter retried by ")
    assert str(letter.letter_id) in line
    assert "'because\\nof'" in line


async def test_what_a_link_says_was_done_is_not_believed(world: World) -> None:
    assert "call this number" not in await world.ann.page("/letters?said=call+this+number")


async def test_a_page_that_takes_too_long_says_so(world: World) -> None:
    async with world.shop.pool.transaction() as tx:
        await tx.execute("LOCK TABLE soma.dead_letters IN ACCESS EXCLUSIVE MODE")
        from tests.console_shop import open_backend

        settings = ConsoleSettings(query_timeout=0.3)
        async with open_backend(world.shop.config, world.shop.config.postgres_dsn, settings) as backend:
            from soma_common.console.serving import make_console

            answer = await Visitor(make_console(settings, backend)[1]).get("/letters")
    assert answer.status_code == 504
    assert "took too long" in answer.text
