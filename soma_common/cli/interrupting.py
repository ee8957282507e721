"""Work that goes on until Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any

from soma_common.garbage import calm_collector


def interruptible(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run it with a calm collector; Ctrl-C ends it with exit code 130.

    Also where a script started it in the background: its shell made it deaf to SIGINT.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with calm_collector():
            asyncio.run(work())
    except KeyboardInterrupt:
        sys.exit(130)
