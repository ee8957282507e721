"""Real servers for tests, and what helps to write them; each name is loaded when it is first used.

Servers come as pytest fixtures (docs/how-to/test-your-service.md). Strategies of hypothesis are in
:mod:`soma_common.testing.strategies`, the kit for sagas in :mod:`soma_common.testing.sagas`.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from soma_common.testing.compatibility import assert_compatible as assert_compatible
    from soma_common.testing.factories import make_event as make_event
    from soma_common.testing.factories import make_recorded as make_recorded
    from soma_common.testing.recording import EventRecorder as EventRecorder
    from soma_common.testing.sagas import SagaTestKit as SagaTestKit
    from soma_common.testing.waiting import eventually as eventually
    from soma_common.testing.waiting import sync_eventually as sync_eventually

_HOME = {
    "EventRecorder": "recording",
    "SagaTestKit": "sagas",
    "assert_compatible": "compatibility",
    "eventually": "waiting",
    "make_event": "factories",
    "make_recorded": "factories",
    "sync_eventually": "waiting",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'soma_common.testing' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"soma_common.testing.{_HOME[name]}"), name)
    globals()[name] = value
    return value
