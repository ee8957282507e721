"""Django's requests, under WSGI and under ASGI, asked over the network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

ROOT = Path(__file__).parents[3]
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HEADERS = {"X-Tenant-ID": "acme", "X-Correlation-ID": "o-1", "traceparent": PARENT}


@pytest.fixture(params=["wsgi", "asgi"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    program = [sys.executable, "-m", "tests.integration.web.django_program", request.param]
    process = subprocess.Popen(
        program, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


@pytest.mark.parametrize("path", ["/plain/1", "/awaited/1"])
def test_views_of_both_kinds_know_whom_they_serve(url: str, path: str) -> None:
    answer = httpx.get(url + path, headers=HEADERS)
    assert answer.json() == {"tenant": "acme", "correlation": "o-1", "event": "o-1", "trace": PARENT}
    assert answer.headers.get_list("X-Correlation-ID") == ["o-1"]


def test_streams_know_it_to_their_end(url: str) -> None:
    for path in ("/stream", "/awaited-stream"):
        assert httpx.get(url + path, headers=HEADERS).text == "acme acme acme "


def test_refusals_and_errors(url: str) -> None:
    refused = httpx.get(f"{url}/plain/1", headers={"X-Correlation-ID": "mine"})
    assert (refused.status_code, refused.text) == (400, "X-Tenant-ID is missing.\n")
    assert refused.headers["X-Correlation-ID"] == "mine"
    assert httpx.get(f"{url}/plain/1", headers={"X-Tenant-ID": "a b"}).status_code == 400
    failed = httpx.get(f"{url}/fails", headers=HEADERS)
    assert (failed.status_code, failed.headers["X-Correlation-ID"]) == (500, "o-1")
    free = httpx.get(f"{url}/free", headers={"X-Correlation-ID": "a\tb"})
    assert free.json()["tenant"] is None
    assert re.fullmatch(r"[0-9a-f-]{36}", free.json()["correlation"])


def test_requests_at_once_never_see_each_other(url: str) -> None:
    def told(number: int) -> tuple[str, str]:
        path = ("/plain/1", "/awaited/1", "/stream", "/awaited-stream")[number % 4]
        answer = httpx.get(url + path, headers={"X-Tenant-ID": f"t{number}"})
        return f"t{number}", answer.json()["tenant"] if number % 4 < 2 else answer.text.split()[2]

    with ThreadPoolExecutor(16) as pool:
        for asked, found in pool.map(told, range(120)):
            assert asked == found
