"""What a request's headers say of whom and of what it is: read with care, for anybody can send them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from soma_common.ambient import Ambient
from soma_common.errors import ConfigurationError
from soma_common.events.ids import uuid7
from soma_common.tracing.context import TraceContext

MOST: Final = 128
"""Characters of a tenant or a correlation id in a header."""

_VALUE: Final = re.compile(rf"[!-+\--~]{{1,{MOST}}}")  # visible ASCII but the comma, which joins repeated headers
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
_TRACESTATE: Final = re.compile(r"[ -~]{1,512}")
_BAGGAGE: Final = re.compile(r"[ -~]{1,8192}")

Values = Callable[[str], Sequence[str]]
"""All values of a header, by its name in lower case."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextSettings:
    """What requests may say of themselves.

    Args:
        tenant_header: names the tenant. Only something that knows who asks may set it: the gateway must overwrite what
            clients send.
        correlation_header: names the business transaction; a request without one, or with one that cannot be, gets a
            new id. The answer carries it.
        require_tenant: requests without a tenant are refused with 400.
        without_tenant: paths, and with a ``/`` at the end all below them, that need none: pages for probes.
        baggage: keys of W3C baggage that are let in; others are dropped.
        traces: go on with the caller's trace; False for requests of strangers, who could join any.
        spans: make a span for a request, where nobody else has made one.

    Raises:
        ConfigurationError: a name that no header can have.
    """

    tenant_header: str = "X-Tenant-ID"
    correlation_header: str = "X-Correlation-ID"
    require_tenant: bool = False
    without_tenant: Sequence[str] = ()
    baggage: Sequence[str] = ()
    traces: bool = True
    spans: bool = True

    def __post_init__(self) -> None:
        for what in ("tenant_header", "correlation_header"):
            name = getattr(self, what)
            if not isinstance(name, str) or not _TOKEN.fullmatch(name):
                raise ConfigurationError(f"{what} is {name!r:.80}.", cure="use the name of a header.")
        for what in ("without_tenant", "baggage"):
            if isinstance(getattr(self, what), str):
                raise ConfigurationError(f"{what} is a text.", cure="pass a sequence of texts.")

    def needs_tenant(self, path: str) -> bool:
        """Whether a request for this path must name a tenant."""
        return self.require_tenant and not any(
            path == known or (known.endswith("/") and path.startswith(known)) for known in self.without_tenant
        )


@dataclass(frozen=True, slots=True)
class Said:
    """What a request says, as far as it is believed; ``refusal`` is why it is not served, empty if it is."""

    tenant_id: str | None
    correlation_id: str
    trace: TraceContext | None
    baggage: str | None
    refusal: str = ""

    def ambient(self, trace: TraceContext | None) -> Ambient:
        """What the request's work is done for, in this trace."""
        return Ambient(self.tenant_id, self.correlation_id, trace, self.baggage)


def said(settings: ContextSettings, path: str, values: Values) -> Said:
    """Read the headers of a request. Never raises, whatever they hold."""
    tenants = values(settings.tenant_header.lower())
    tenant = _single(tenants)
    refusal = ""
    if tenants and tenant is None:
        refusal = f"{settings.tenant_header} is malformed: give one tenant of 1 to {MOST} visible ASCII characters."
    elif tenant is None and settings.needs_tenant(path):
        refusal = f"{settings.tenant_header} is missing."
    return Said(
        tenant,
        _single(values(settings.correlation_header.lower())) or str(uuid7()),
        _trace(values) if settings.traces else None,
        allowed(values("baggage"), settings.baggage),
        refusal,
    )


def _single(values: Sequence[str]) -> str | None:
    """The value of a header that was given once (or several times the same), if it can be a name."""
    distinct = set(values)
    if len(distinct) != 1:
        return None
    value = distinct.pop().strip(" \t")
    return value if _VALUE.fullmatch(value) else None


def _trace(values: Values) -> TraceContext | None:
    """The caller's context. Two parents are none, and a malformed state is dropped alone (the standard's rules)."""
    parents = values("traceparent")
    if len(parents) != 1:
        return None
    state = ",".join(values("tracestate"))
    return TraceContext.parse(parents[0], state if _TRACESTATE.fullmatch(state) else None)


def allowed(values: Iterable[str], keys: Sequence[str]) -> str | None:
    """The members of a W3C baggage with these keys, as they came; None when there are none."""
    text = ",".join(values) if keys else ""
    if not _BAGGAGE.fullmatch(text):
        return None
    members = (member.strip() for member in text.split(","))
    return ",".join(member for member in members if member.partition("=")[0].strip() in keys) or None
