"""Which application is open in this process: for code that is not told."""

from __future__ import annotations

from typing import Any, Final
from weakref import WeakSet

from soma_common.errors import ConfigurationError

_OPEN: Final[WeakSet[Any]] = WeakSet()


def opened(application: Any) -> None:
    """It is open from now on."""
    _OPEN.add(application)


def closed(application: Any) -> None:
    """It is no longer open."""
    _OPEN.discard(application)


def the_open_one() -> Any:
    """The only open application.

    Raises:
        ConfigurationError: there is none, or more than one.
    """
    known = list(_OPEN)
    if len(known) != 1:
        raise ConfigurationError(
            f"{len(known) or 'No'} applications are open in this process, so it is not clear which one is meant."
            if known
            else "No application is open in this process.",
            cure="say which: @soma.trace_transaction(...) or @trace_transaction(app=soma, ...)"
            + (", and use `async with soma:` around the program." if not known else "."),
        )
    return known[0]
