"""A loop that a foreign library's cancellation ends must not look like one that was asked to stop."""

from __future__ import annotations

import asyncio

import pytest

from soma_common.errors import ServiceEnded
from soma_common.service import Service, run_until_signalled


class _Cancelled(Service):
    async def run(self) -> None:
        raise asyncio.CancelledError


async def test_a_cancellation_from_within_is_an_error() -> None:
    with pytest.raises(ServiceEnded, match="was cancelled from within"):
        await run_until_signalled(_Cancelled("fragile"))
