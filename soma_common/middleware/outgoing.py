"""What goes with requests to other services: the trace, and to our own also correlation, tenant and baggage.

outgoing = OutgoingContext(hosts=["stock.internal", ".shop.example"])
httpx.Client(event_hooks={"request": [outgoing.hook]})
httpx.AsyncClient(event_hooks={"request": [outgoing.async_hook]})
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from soma_common.ambient import current_baggage, current_correlation_id, current_tenant
from soma_common.errors import ConfigurationError
from soma_common.middleware.headers import ContextSettings, allowed
from soma_common.tracing.tracer import TransactionTracer

_ADDED: Final = "soma_context"  # in a request's extensions, which follow it through redirects


class OutgoingContext:
    """Adds headers to requests, as event hooks of httpx; ``headers`` gives them to other clients.

    Strangers get ``traceparent`` alone: what a tenant or an order is called is nobody's business but ours. When a
    request is redirected to a stranger, it loses again what was added. A header that the caller set stays as it is.

    Args:
        hosts: our own services; a name that begins with a dot stands for all below it.
        baggage: keys of the baggage that go to them.
        strangers: whether others get the trace.
        tenant_header, correlation_header: as in :class:`ContextSettings`.

    Raises:
        ConfigurationError: an option is none that can be.
    """

    def __init__(
        self, *, hosts: Sequence[str] = (), baggage: Sequence[str] = (), strangers: bool = True,
        tenant_header: str = "X-Tenant-ID", correlation_header: str = "X-Correlation-ID",
    ) -> None:  # fmt: skip
        if isinstance(hosts, str):
            raise ConfigurationError("hosts is a text.", cure="pass a sequence of host names.")
        self._names = ContextSettings(
            tenant_header=tenant_header, correlation_header=correlation_header, baggage=baggage
        )
        self._hosts, self._strangers = tuple(host.lower() for host in hosts), strangers
        self._tracer = TransactionTracer()

    def headers(self, host: str) -> dict[str, str]:
        """What goes with a request to a host now, by the header's name."""
        ours = self._is_ours(host)
        trace = self._tracer.current() if ours or self._strangers else None
        found = {"traceparent": trace.traceparent if trace else None}
        if ours:
            baggage = current_baggage()
            found |= {
                "tracestate": trace.tracestate if trace else None,
                "baggage": allowed([baggage], self._names.baggage) if baggage else None,
                self._names.tenant_header: current_tenant(),
                self._names.correlation_header: current_correlation_id(),
            }
        return {name: value for name, value in found.items() if value is not None and _fits(value)}

    def hook(self, request: Any) -> None:
        """For ``httpx.Client``."""
        for name in request.extensions.get(_ADDED, ()):
            request.headers.pop(name, None)
        added = []
        for name, value in self.headers(request.url.host).items():
            if name not in request.headers:
                request.headers[name] = value
                added.append(name)
        request.extensions = {**request.extensions, _ADDED: added}

    async def async_hook(self, request: Any) -> None:
        """For ``httpx.AsyncClient``."""
        self.hook(request)

    def _is_ours(self, host: str) -> bool:
        name = host.lower()
        return any(name == known or (known.startswith(".") and name.endswith(known)) for known in self._hosts)


def _fits(value: str) -> bool:
    """Whether a header can carry it: a tenant's name may have any letters."""
    return value.isascii() and value.isprintable()
