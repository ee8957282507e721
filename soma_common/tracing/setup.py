"""Sending spans to a collector: for programs that have no TracerProvider of their own."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import trace

from soma_common.config import otlp_endpoint
from soma_common.errors import ConfigurationError, MissingDependency
from soma_common.ranges import check_settings
from soma_common.tracing.tracer import SILENT

log = logging.getLogger(__name__)

_PATH: Final = "/v1/traces"
_MINE: Final[dict[str, Any]] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracing:
    """Where spans go. ``provider`` is the process's, ``installed`` whether this library made it."""

    provider: Any
    installed: bool

    def flush(self, timeout: float = 30.0) -> bool:
        """Send what waits, within so many seconds; whether all of it went, as far as is known."""
        flush = getattr(self.provider, "force_flush", None)
        return bool(flush(int(timeout * 1000))) if flush is not None else True

    def shutdown(self) -> None:
        """Send what waits, and end. Done by itself when the interpreter exits; safe to call twice. A provider that the
        application made is left alone."""
        if self.installed:
            self.provider.shutdown()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Settings:
    sample_ratio: float
    queue: int
    every: float
    timeout: float

    def __post_init__(self) -> None:
        check_settings(self, sample_ratio=(0.0, 1.0), queue=(1, 1_000_000), every=(0.01, 3600.0), timeout=(0.1, 3600.0))


def configure_tracing(
    *, service: str, endpoint: str | None = None, sample_ratio: float = 1.0, queue: int = 8192, every: float = 1.0,
    timeout: float = 10.0,
) -> Tracing:  # fmt: skip
    """Send this process's spans to a collector by OTLP over HTTP, unless somebody has set a TracerProvider before.

    Needs the extra ``otlp``. Spans wait in a bounded queue and go in batches from a thread of their own: a collector
    that is away costs spans, which the SDK's log tells, and never holds anything up. What waits is sent at the exit of
    the interpreter.

    Which traces are kept is decided where they begin, before anybody knows how they end. To keep all that fail and a
    part of the others, keep all here and decide in the collector (tail sampling).

    Args:
        service: ``service.name`` of the spans.
        endpoint: where the collector is, as ``http://collector:4318``; a path is taken as it is, else it is
            ``/v1/traces``. By default ``SOMASTACK_JAEGER_ENDPOINT``, then ``OTEL_EXPORTER_OTLP_ENDPOINT``.
        sample_ratio: the part of the traces begun here that is recorded, 0 to 1. One begun elsewhere is recorded if it
            is there.
        queue: spans that may wait; later ones are dropped.
        every: seconds after which a batch goes, however small.
        timeout: seconds for sending one.

    Raises:
        ConfigurationError: no endpoint is known, or a value is none that can be.
        MissingDependency: the extra is not installed.
    """
    settings = _Settings(sample_ratio=sample_ratio, queue=queue, every=every, timeout=timeout)
    known = trace.get_tracer_provider()
    if not isinstance(known, SILENT):
        if known is not _MINE.get("provider"):
            log.info("Tracing is left as it is: the application has a %s.", type(known).__qualname__)
        return Tracing(provider=known, installed=known is _MINE.get("provider"))
    provider = _provider(service, _address(endpoint or otlp_endpoint()), settings)
    trace.set_tracer_provider(provider)
    if trace.get_tracer_provider() is not provider:  # another thread was quicker
        provider.shutdown()
        return Tracing(provider=trace.get_tracer_provider(), installed=False)
    _MINE["provider"] = provider
    return Tracing(provider=provider, installed=True)


def _provider(service: str, address: str, settings: _Settings) -> Any:
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"Sending spans needs {error.name}, which is not installed.", cure="pip install 'soma-common[otlp]'."
        ) from error
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(settings.sample_ratio), resource=Resource.create({SERVICE_NAME: service})
    )
    exporter = OTLPSpanExporter(endpoint=address, timeout=settings.timeout)
    provider.add_span_processor(
        BatchSpanProcessor(
            exporter,
            max_queue_size=settings.queue,
            schedule_delay_millis=settings.every * 1000,
            max_export_batch_size=min(512, settings.queue),
        )
    )
    return provider


def _address(endpoint: str) -> str:
    if not endpoint:
        raise ConfigurationError(
            "No collector is named.", cure="pass endpoint='http://collector:4318', or set SOMASTACK_JAEGER_ENDPOINT."
        )
    text = endpoint if "://" in endpoint else f"http://{endpoint}"
    try:
        parts = urlsplit(text)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ConfigurationError(
            f"The collector's address {endpoint!r:.120} is not a web address.", cure="write http://collector:4318."
        )
    return urlunsplit(parts._replace(path=parts.path if parts.path.strip("/") else _PATH))
