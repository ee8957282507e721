"""A person with a real Chromium: sees a failure, looks into it, mends it, and sees it resolved. Pictures are kept where
SOMA_TEST_SCREENSHOTS says.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from axe_playwright_python.async_playwright import Axe
from playwright.async_api import Error

from tests.browser import browser
from tests.console_server import Served, program, served
from tests.console_shop import TENANT, furnish, opened, order

pytestmark = pytest.mark.timeout(300)
WIDE = {"width": 1280, "height": 860}
PHONE = {"width": 390, "height": 844}


class Place(NamedTuple):
    """A furnished shop, its console, and where its pages are."""

    console: Served
    pages: dict[str, str]


@pytest.fixture
async def chromium() -> AsyncIterator[Any]:
    async with browser() as running:
        yield running


@pytest.fixture
async def place(soma_database: str) -> AsyncIterator[Place]:
    pages = await _furnished(soma_database)
    with served(soma_database, "--app", "tests.console_shop:SHOP") as console:
        yield Place(console, pages)


async def _furnished(dsn: str) -> dict[str, str]:
    """What is to be seen on each page."""
    async with opened(dsn) as (shop, backend):
        sagas = await furnish(shop)
        done = await shop.sagas.get_saga(sagas["completed"])
        page = await backend.letters("test").list_dlq_events(tenant_id=TENANT)
        letter = next(each for each in page.letters if each.status == "dead")
        event = letter.event
        from soma_common.replay.models import ReplayFilter

        async with backend.engine("billing") as engine:
            run = await engine.start(ReplayFilter(tenant_id=TENANT), requested_by="ann", reason="a new column")
    return {
        "overview": "/", "events": "/events", "event": f"/events/{event.event_id}",
        "stream": f"/stream?tenant={TENANT}&aggregate_type=order&aggregate_id=o-3",
        "trace": "/correlation?id=checkout-o-3", "correlation": "/correlation?id=checkout-s-1",
        "waterfall": f"/traces/{done.trace_id}?correlation={done.correlation_id}", "sagas": "/sagas?status=all", "saga": f"/sagas/{sagas['stuck']}",
        "saga-done": f"/sagas/{sagas['compensated']}", "definition": "/definitions/place-order/2", "letters": "/letters",
        "letters-found": "/letters/found", "letter": f"/letters/{letter.letter_id}",
        "letter-edit": f"/letters/{letter.letter_id}/edit", "redrive": "/redrive", "replays": "/replays",
        "replay": f"/replays/{run.run_id}", "replay-plan": "/replays/new?consumer=billing", "consumers": "/readers",
        "empty": "/events?event_type=nothing.such", "error": "/letters/00000000-0000-7000-8000-000000000000",
    }  # fmt: skip


async def _until(page: Any, condition: str) -> None:
    """Wait for something in the page; its own way of waiting is a script that the page's policy forbids."""
    for _ in range(200):
        with suppress(Error):  # it is just going to another page
            if await page.evaluate(condition):
                return
        await asyncio.sleep(0.1)
    raise AssertionError(condition)


async def shot(page: Any, name: str) -> None:
    """A picture, where somebody wants them."""
    folder = os.environ.get("SOMA_TEST_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        await page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


async def test_from_the_failure_to_the_end_of_it(place: Place, chromium: Any, soma_database: str) -> None:
    page = await chromium.new_page(viewport=WIDE)
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda line: trouble.append(line.text) if line.type == "error" else None)
    await page.goto(place.console.url)
    await page.get_by_role("link", name=re.compile(r"dead letters wait for a person")).click()  # it is seen
    await page.get_by_role("link", name="ValueError").first.click()  # of which kind
    await page.locator("tbody tr").first.get_by_role("link").first.click()  # one of them
    assert "has no amount" in await page.inner_text("main")
    await shot(page, "path-1-letter")
    await page.get_by_role("link", name="Edit…").click()
    text = await page.input_value("#value")
    assert '"amount": null' in text
    await page.fill("#value", text.replace('"amount": null', '"amount": 77'))
    await page.get_by_role("button", name="Compare and check").click()
    assert "77" in await page.inner_text(".diff .new")
    assert "Its payload fits OrderPlaced" in await page.inner_text(".checks")
    assert await page.locator(".checks .bad").count() == 0
    await shot(page, "path-2-dry-run")
    await page.get_by_label("Reason, for the history").fill("the form lost the amount")
    await page.get_by_role("button", name="Save and retry").click()
    await page.get_by_role("status").filter(has_text="Another try is asked for").wait_for()
    with program(soma_database, "-m", "tests.console_shop"):
        for _ in range(100):
            if await page.locator("h1 .pill").inner_text() == "resolved":
                break
            await page.wait_for_timeout(200)
            await page.reload()
    assert await page.locator("h1 .pill").inner_text() == "resolved"
    history = await page.inner_text("main")
    assert "the form lost the amount" in history
    assert "(console)" in history
    await shot(page, "path-3-resolved")
    assert trouble == []


async def findings(page: Any) -> list[tuple[Any, ...]]:
    """What axe finds in a page, from moderate on."""
    result = await Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]})
    return [
        (each["id"], each["impact"], [node["html"][:160] for node in each["nodes"][:3]])
        for each in result.response["violations"]
        if each["impact"] in ("serious", "critical", "moderate")
    ]


@pytest.mark.parametrize("theme", ["light", "dark"])
async def test_every_page_in_both_colours_without_serious_findings(place: Place, chromium: Any, theme: str) -> None:
    context = await chromium.new_context(viewport=WIDE, color_scheme=theme)
    page, found = await context.new_page(), []
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on("console", lambda line: trouble.append(line.text) if "Content Security Policy" in line.text else None)
    for name, path in place.pages.items():
        await page.goto(place.console.url + path)
        await page.wait_for_load_state("load")
        await shot(page, f"{name}-{theme}")
        found += [(name, *each) for each in await findings(page)]
    await context.close()
    assert found == []
    assert trouble == []


async def test_on_a_phone_nothing_is_wider_than_it(place: Place, chromium: Any) -> None:
    context = await chromium.new_context(viewport=PHONE, has_touch=True, is_mobile=True, device_scale_factor=2)
    page, wide = await context.new_page(), []
    for name, path in place.pages.items():
        await page.goto(place.console.url + path)
        if name in ("overview", "letters", "letter", "saga", "events", "waterfall"):
            await shot(page, f"phone-{name}")
        width = await page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wide.append((name, width))
    await context.close()
    assert wide == []


async def test_keys_lead_everywhere(place: Place, chromium: Any) -> None:
    page = await chromium.new_page(viewport=WIDE)
    await page.goto(place.console.url)
    for key, path in {
        "l": "/letters",
        "e": "/events",
        "s": "/sagas",
        "p": "/replays",
        "c": "/readers",
        "o": "/",
    }.items():
        await page.keyboard.press("g")
        await page.keyboard.press(key)
        await page.wait_for_url(place.console.url + path)
    await page.keyboard.press("?")
    assert await page.get_by_role("dialog", name="Keys").is_visible()
    await shot(page, "keys")
    await page.keyboard.press("Escape")
    await page.goto(place.console.url + "/letters/found")
    await page.keyboard.press("/")
    assert await page.evaluate("document.activeElement.closest('.filters') !== null")
    await page.keyboard.press("Escape")
    await page.evaluate("document.activeElement.blur()")
    await page.keyboard.press("j")
    await page.keyboard.press("j")
    assert await page.locator("tr.chosen").count() == 1
    await page.keyboard.press("Enter")
    await page.wait_for_url(re.compile(r"/letters/[0-9a-f-]{36}"))
    if await page.locator("details[data-act=retry]").count():
        await page.keyboard.press("r")
        await _until(page, "document.activeElement.name === 'reason'")
        await page.keyboard.press("Escape")
        assert await page.locator("details.verb[open]").count() == 0


async def test_colours_stay_as_they_were_chosen(place: Place, chromium: Any) -> None:
    context = await chromium.new_context(viewport=WIDE, color_scheme="light")
    page = await context.new_page()
    await page.goto(place.console.url)
    light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    await page.get_by_label("Colours").select_option("dark")
    await _until(page, "document.documentElement.dataset.theme === 'dark'")
    await page.goto(place.console.url + "/sagas")
    assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != light
    await context.close()


async def test_what_happens_is_seen_without_loading_the_page(place: Place, chromium: Any, soma_database: str) -> None:
    page = await chromium.new_page(viewport=WIDE)
    await page.goto(place.console.url)
    await page.locator(".beat.on").wait_for()
    before = await page.evaluate("document.querySelector('.tile .value').getBoundingClientRect().top")

    async with opened(soma_database) as (shop, _):
        await shop.publish([order(f"n-{n}", 9) for n in range(300)])
    tile = "parseFloat(document.querySelector('.tile .value').textContent)"
    await _until(page, f"{tile} > 4")
    assert await page.evaluate("document.querySelector('.tile .value').getBoundingClientRect().top") == before


async def test_it_works_without_scripts(place: Place, chromium: Any) -> None:
    context = await chromium.new_context(viewport=WIDE, java_script_enabled=False)
    page = await context.new_page()
    await page.goto(place.console.url + place.pages["letter"])
    await page.get_by_text("Discard…").click()
    form = page.locator("details.verb[open] form")
    await form.get_by_label("Reason").fill("nobody ordered this")
    await form.get_by_role("button", name="Discard").click()
    assert await page.locator("h1 .pill").inner_text() == "discarded"
    assert "nobody ordered this" in await page.inner_text("main")
    await context.close()


async def test_signing_in_and_out(soma_database: str, chromium: Any) -> None:
    token = "operator-token-0123456789"
    with served(soma_database, env={"SOMA_CONSOLE_TOKEN": token}) as console:
        page = await chromium.new_page(viewport=WIDE)
        await page.goto(console.url + "/sagas?status=all")
        await shot(page, "sign-in")
        assert await findings(page) == []
        await page.get_by_label("Your name").fill("Ann")
        await page.get_by_label("Token").fill("a wrong one")
        await page.get_by_role("button", name="Sign in").click()
        await page.get_by_role("alert").wait_for()
        await page.get_by_label("Token").fill(token)
        await page.get_by_role("button", name="Sign in").click()
        await page.wait_for_url(console.url + "/sagas?status=all")
        assert "Ann · operator" in await page.inner_text(".tools")
        assert await page.evaluate("document.cookie") == ""
        await page.get_by_role("button", name="Sign out").click()
        await page.wait_for_url(console.url + "/sign-in")
        await page.goto(console.url)
        assert "/sign-in" in page.url
