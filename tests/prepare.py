"""What takes minutes is built before the tests, whose time is limited: python -m tests.prepare."""

from __future__ import annotations

from tests import browser, collector_server, promtool, s3_server, temporal_server

if __name__ == "__main__":
    browser.chromium()
    s3_server.program()
    temporal_server.program()
    collector_server.program()
    promtool.promtool()
