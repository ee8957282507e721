"""The schema registry: reachable, and with a rule that keeps readers safe."""

from __future__ import annotations

from collections.abc import AsyncIterator

from soma_common.cli.checks.findings import Finding, Subject, failed, ok, skipped, warn
from soma_common.config import SomaConfig
from soma_common.errors import SomaError
from soma_common.schemas.address import RegistryAuth, check_url
from soma_common.schemas.rest import Patience, Rest

_RULE = "/admin/rules/COMPATIBILITY"
_SAFE = ("BACKWARD", "BACKWARD_TRANSITIVE", "FULL", "FULL_TRANSITIVE")


async def look(subject: Subject) -> AsyncIterator[Finding]:
    """Everything about the registry; nothing where none is named."""
    config = SomaConfig.from_env(subject.env)
    if not config.registry_url:
        yield skipped("reachable", "no registry is named: events are JSON")
        return
    auth = RegistryAuth(token=config.registry_token) if config.registry_token else None
    try:
        rest = Rest(check_url(config.registry_url), auth, Patience(timeout=subject.limits.within, attempts=1))
    except SomaError as error:
        yield failed("reachable", error)
        return
    try:
        answer = await rest.send("GET", "/system/info")
        rest.expect(answer)
        yield ok("reachable", f"{answer.at('name')} {answer.at('version')}")
        yield await _rule(rest, config.service_id)
    except SomaError as error:
        yield failed("reachable", error)
    finally:
        await rest.close()


async def _rule(rest: Rest, group: str) -> Finding:
    """The group's own rule counts before the registry's."""
    for path, whose in ((f"/groups/{group}/rules/COMPATIBILITY", f"group {group}"), (_RULE, "the registry")):
        answer = await rest.send("GET", path)
        if answer.status == 200:
            rule = str(answer.at("config"))
            if rule in _SAFE:
                return ok("compatibility", f"{rule}, a rule of {whose}")
            return warn("compatibility", f"{rule}, a rule of {whose}: old events may become illegible", _CURE)
        if answer.status != 404:
            rest.expect(answer)
    return warn("compatibility", "there is no rule: old events may become illegible", _CURE)


_CURE = "run `somastack schemas push`, which sets the rule BACKWARD."
