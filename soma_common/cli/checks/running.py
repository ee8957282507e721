"""Runs the checks of all areas at once, each with an end, and tells what they found in their order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from importlib import import_module
from typing import Final

from soma_common.cli.checks.findings import Area, Finding, Subject, fail, failed, skipped
from soma_common.errors import SomaError

_MODULES: Final = {
    Area.SETTINGS: "settings", Area.MACHINE: "machine", Area.DATABASE: "database", Area.KAFKA: "broker",
    Area.REGISTRY: "registry", Area.WORK: "work",
}  # fmt: skip
_QUESTIONS: Final = 6  # how many times an area may wait for the bound of one question
_LOCAL: Final = (Area.SETTINGS, Area.MACHINE)

Look = Callable[[Subject], AsyncIterator[Finding]]


async def examine(subject: Subject, areas: Collection[Area]) -> Mapping[Area, list[Finding]]:
    """What the checks of these areas find. Where the settings cannot be read, what rests on them is skipped."""
    wanted = [area for area in Area if area in areas]
    settings = await _findings(Area.SETTINGS, subject)
    legible = not any(finding.check == "settings" and finding.cure for finding in settings)
    running = {
        area: asyncio.create_task(_findings(area, subject))
        for area in wanted
        if area is not Area.SETTINGS and (legible or area in _LOCAL)
    }
    found: dict[Area, list[Finding]] = {}
    for area in wanted:
        if area is Area.SETTINGS:
            found[area] = settings
        elif area in running:
            found[area] = await running[area]
        else:
            found[area] = [skipped("reachable", "the settings cannot be read")]
    return found


async def _findings(area: Area, subject: Subject) -> list[Finding]:
    look: Look = import_module(f"soma_common.cli.checks.{_MODULES[area]}").look
    found: list[Finding] = []
    within = _QUESTIONS * subject.limits.within
    try:
        async with asyncio.timeout(within):
            async for finding in look(subject):
                found.append(finding)  # noqa: PERF401  # what was found before an error is told
    except SomaError as error:
        found.append(failed("checks", error))
    except TimeoutError:
        found.append(
            fail("checks", f"no answer within {within:g} s", "look whether the server is overloaded or hangs.")
        )
    return found
