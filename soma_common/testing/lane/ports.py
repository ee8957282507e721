"""Free loopback ports, chosen so that parallel runs rarely meet and restarts keep their port.

The kernel hands out 32768 and above to outgoing connections, so a port from there can be taken by any client while a
server restarts. Ports are drawn from below instead; whoever loses the race for one draws again (``process.start``).
"""

from __future__ import annotations

import random
import socket

from soma_common.errors import ServerUnavailable

LOOPBACK = "127.0.0.1"
_RANGE = range(20_000, 32_000)
_DRAWS = 200
_random = random.SystemRandom()  # never the seeded generator of a test run: every run would draw the same ports


def free_port() -> int:
    """A TCP port nobody listens on at this moment. Raises ServerUnavailable when none is found."""
    for port in (_random.choice(_RANGE) for _ in range(_DRAWS)):
        if is_free(port):
            return port
    raise ServerUnavailable(
        f"No free TCP port between {_RANGE.start} and {_RANGE.stop} on {LOOPBACK}.",
        cure="end servers left over from other work.",
    )


def is_free(port: int) -> bool:
    """Whether nobody listens on a port of loopback at this moment."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True
