"""What requests say of themselves: believed where it can be, dropped or refused where not, and never an exception."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soma_common.ambient import working_for
from soma_common.errors import ConfigurationError
from soma_common.events.models import Event
from soma_common.middleware.headers import ContextSettings, Said, allowed, said
from soma_common.middleware.outgoing import OutgoingContext

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
SETTINGS = ContextSettings(require_tenant=True, without_tenant=["/health", "/static/"], baggage=["plan"])
ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def read(path: str = "/orders", settings: ContextSettings = SETTINGS, **headers: str | Sequence[str]) -> Said:
    values = {name.replace("_", "-"): [v] if isinstance(v, str) else v for name, v in headers.items()}
    return said(settings, path, lambda name: values.get(name, ()))


def test_what_is_well_formed_is_taken() -> None:
    found = read(
        x_tenant_id="acme", x_correlation_id="o-1", traceparent=PARENT, tracestate="a=1", baggage="plan=gold,x=1"
    )
    assert (found.tenant_id, found.correlation_id, found.refusal) == ("acme", "o-1", "")
    assert found.trace is not None
    assert (found.trace.traceparent, found.trace.tracestate) == (PARENT, "a=1")
    assert found.baggage == "plan=gold"


@pytest.mark.parametrize("tenant", ["", "a b", "a\r\nb", "a,b", "ü", "x" * 129, "\0", ["a", "b"]])
def test_a_malformed_tenant_is_refused(tenant: str) -> None:
    for settings in (SETTINGS, ContextSettings()):
        assert "malformed" in read(settings=settings, x_tenant_id=tenant).refusal


def test_a_missing_tenant_is_refused_where_one_is_needed() -> None:
    assert read().refusal == "X-Tenant-ID is missing."
    assert read("/health").refusal == read("/static/a.css").refusal == ""
    assert "missing" in read("/healthy").refusal
    assert "missing" in read("/static").refusal
    assert read(settings=ContextSettings()).refusal == ""
    assert read(x_tenant_id=["a", "a"]).tenant_id == "a"


@pytest.mark.parametrize("correlation", [None, "", "a b", "a\r\nSet-Cookie: x", "a,b", "ü", "x" * 129, ["a", "b"]])
def test_a_correlation_that_cannot_be_is_replaced(correlation: str | None) -> None:
    headers = {} if correlation is None else {"x_correlation_id": correlation}
    assert ID.fullmatch(read(x_tenant_id="a", **headers).correlation_id)


@pytest.mark.parametrize("parent", [[PARENT, PARENT], "nonsense", [], "00-" + "0" * 32 + PARENT[35:]])
def test_two_parents_are_none(parent: str | list[str]) -> None:
    assert read(traceparent=parent).trace is None


def test_traces_of_strangers_may_be_left_out() -> None:
    assert read(settings=ContextSettings(traces=False), traceparent=PARENT).trace is None
    found = read(traceparent=PARENT, tracestate="é=1").trace
    assert found is not None
    assert found.tracestate is None


def test_baggage_is_let_in_by_its_key_only() -> None:
    assert allowed(["a=1, b=2;p=q ,c = 3", "b=4"], ["b", "c"]) == "b=2;p=q,c = 3,b=4"
    assert allowed(["a=1"], []) is None
    assert allowed(["planx=1,xplan=2,PLAN=3"], ["plan"]) is None
    assert allowed(["plan=" + "x" * 9000], ["plan"]) is None
    assert allowed(["plan=\r\n"], ["plan"]) is None


HOSTILE = st.lists(st.text(alphabet=st.characters(max_codepoint=255), max_size=200), max_size=3)


@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_whatever_they_hold_an_event_can_be_made(
    tenant: list[str], correlation: list[str], parent: list[str], state: list[str], baggage: list[str]
) -> None:
    found = read(
        "/health", x_tenant_id=tenant, x_correlation_id=correlation, traceparent=parent, tracestate=[*state, "a=1"],
        baggage=baggage,
    )  # fmt: skip
    if not found.refusal:
        with working_for(found.ambient(found.trace)):
            made = Event(
                payload={}, event_type="a.b", aggregate_id="1", tenant_id=found.tenant_id or "t", trace=found.trace
            )
        assert made.correlation_id == found.correlation_id
        assert OutgoingContext(hosts=["a"]).headers("a") == {}


@pytest.mark.parametrize(
    "options",
    [{"tenant_header": "X Tenant"}, {"correlation_header": ""}, {"baggage": "plan"}, {"without_tenant": "/health"},
     {"tenant_header": None}],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ConfigurationError):
        ContextSettings(**options)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigurationError):
        OutgoingContext(hosts="a")
