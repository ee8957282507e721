"""The console as a process: what it says when it starts, what it tells while it runs, and how it ends."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.console_server import program, served
from tests.console_shop import drain, opened, order
from tests.waiting import until

pytestmark = pytest.mark.timeout(120)
TOKEN = "operator-token-0123456789"


async def events_of(response: httpx.Response, most: int = 100) -> Any:
    """Server-sent events as they come: (name, value)."""
    name = ""
    async for line in response.aiter_lines():
        if line.startswith("event: "):
            name = line[7:]
        elif line.startswith("data: "):
            yield name, json.loads(line[6:])
            most -= 1
            if not most:
                return


async def test_what_changes_is_told(soma_database: str) -> None:
    async with opened(soma_database) as (shop, _):
        with served(soma_database) as console:
            async with (
                httpx.AsyncClient(base_url=console.url, timeout=20) as http,
                http.stream("GET", "/live/overview") as live,
            ):
                assert live.headers["content-type"].startswith("text/event-stream")
                told = events_of(live)
                name, parts = await anext(told)
                assert (name, list(parts)) == ("parts", ["overview"])
                assert "Nothing does." in parts["overview"]
                await shop.publish(order("x", None))
                await drain(shop)

                async def seen() -> bool:
                    _, parts = await anext(told)
                    return "1 dead letter waits for a person" in parts.get("overview", "")

                await until(seen)


async def test_a_re_drive_is_told_to_its_end(soma_database: str) -> None:
    async with opened(soma_database) as (shop, _):
        await shop.publish([order(f"x-{n}", None) for n in range(5)])
        await drain(shop)
        with served(soma_database) as console:
            async with httpx.AsyncClient(base_url=console.url, timeout=30) as http:
                csrf = (await http.get("/redrive")).text.partition('name="csrf" value="')[2].partition('"')[0]
                answer = await http.post(
                    "/redrive", data={"csrf": csrf, "reason": "r", "failures": "2"}, headers={"origin": console.url}
                )
                path = answer.headers["location"]
                async with shop.consumer("billing"), http.stream("GET", f"/live{path}") as live:
                    told = [each async for each in events_of(live)]
    assert told[-1][0] == "over"
    assert "failed again" in told[-2][1]["job"]


async def test_live_connections_are_bounded_and_end_when_it_stops(soma_database: str) -> None:
    with served(soma_database) as console:
        async with httpx.AsyncClient(base_url=console.url, timeout=20, limits=httpx.Limits(max_connections=64)) as http:
            lives = [await http.send(http.build_request("GET", "/live/overview"), stream=True) for _ in range(32)]
            kept = [live.aiter_bytes() for live in lives]  # one that is forgotten hangs up
            for parts in kept:
                await anext(parts)
            assert (await http.get("/live/overview")).status_code == 503
            assert (await http.get("/events")).status_code == 200  # pages have their own room
            await lives[0].aclose()

            async def room() -> bool:
                async with http.stream("GET", "/live/overview") as again:
                    return again.status_code == 200

            await until(room)
            began = time.monotonic()
            ended = await asyncio.to_thread(console.stop)
            assert time.monotonic() - began < 4
            assert ended in (0, -15, 143)
            for live in lives[1:]:
                await live.aclose()


async def test_a_token_from_a_file(soma_database: str, tmp_path: Path) -> None:
    secret = tmp_path / "token"
    secret.write_text(f"{TOKEN}\n")
    with served(soma_database, env={"SOMA_CONSOLE_TOKEN_FILE": str(secret)}) as console:
        async with httpx.AsyncClient(base_url=console.url) as http:
            assert (await http.get("/")).status_code == 303
            assert (await http.get("/", headers={"authorization": f"Bearer {TOKEN}"})).status_code == 200
            assert (await http.get("/healthz")).text == "ok\n"
        command = Path(f"/proc/{console.process.pid}/cmdline").read_text()
        assert TOKEN not in command


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"SOMA_CONSOLE_HOST": "0.0.0.0"}, "does not listen on 0.0.0.0 without knowing who comes"),
        ({"SOMA_CONSOLE_HOST": "::"}, "does not listen on ::"),
        ({"SOMA_CONSOLE_TOKEN": "short"}, "SOMA_CONSOLE_TOKEN is no good token"),
        ({"SOMA_CONSOLE_TOKEN_FILE": "/nowhere"}, "SOMA_CONSOLE_TOKEN_FILE cannot be read"),
        ({"SOMA_CONSOLE_PROXIES": "everybody"}, "SOMA_CONSOLE_PROXIES has 'everybody'"),
        ({"SOMA_CONSOLE_PORT": "x"}, "SOMA_CONSOLE_PORT is 'x'"),
    ],
)
def test_it_refuses_to_start_open_or_wrong(soma_database: str, env: dict[str, str], told: str) -> None:
    with program(soma_database, "-m", "soma_common.cli.main", "console", env=env) as process:
        out = process.communicate(timeout=30)[0]
    assert process.returncode == 1
    assert told in out
    assert "Cure:" in out
    assert "Traceback" not in out


def test_a_port_that_is_taken(soma_database: str) -> None:
    with served(soma_database) as console:
        port = console.url.rpartition(":")[2]
        with program(soma_database, "-m", "soma_common.cli.main", "console", "--port", port) as second:
            out = second.communicate(timeout=30)[0]
    assert second.returncode == 1
    assert f"cannot listen on 127.0.0.1, port {port}" in out


def test_https_with_a_certificate(soma_database: str, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", str(key), "-out", str(certificate), "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True,
    )  # fmt: skip
    env = {"SOMA_CONSOLE_CERTIFICATE": str(certificate), "SOMA_CONSOLE_CERTIFICATE_KEY": str(key)}
    with served(soma_database, env=env) as console:
        answer = httpx.get(console.url, verify=ssl.create_default_context(cafile=str(certificate)))
        assert console.url.startswith("https://")
        assert answer.status_code == 200
        assert "Secure" in answer.headers["set-cookie"]
