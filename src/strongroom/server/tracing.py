"""OpenTelemetry traces: one span for each request, below it one for each call of the store.

Traces are on where OpenTelemetry's own variables name an exporter (OTEL_EXPORTER_OTLP_ENDPOINT). Otherwise nothing of
this module runs, and the packages need not be installed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .errors import Send
from .trace_context import enter_trace
from .verify import PATH as VERIFY
from .verify import Asgi, Receive
from .wire import request_id_of

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
SERVICE = "strongroom"
_TRACEPARENT = re.compile(rb"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")


def wanted(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether an exporter of traces is configured."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none":
        return False
    return any(environment.get(name) for name in ENDPOINTS)


def provider() -> TracerProvider:
    """What makes spans and sends them by OTLP over HTTP, as the OTEL_ variables say. Raises ConfigError without the
    packages."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import OTELResourceDetector, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        named = next(name for name in ENDPOINTS if os.environ.get(name))
        raise ConfigError(f"{named} asks for traces: install strongroom[telemetry], or unset it") from None
    resource = Resource({"service.name": SERVICE}).merge(OTELResourceDetector().detect())
    made = TracerProvider(resource=resource)
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return made


class Tracing:
    """Makes the span of each request. `provider` None: no spans, and log lines name the trace of the caller alone."""

    def __init__(self, provider: TracerProvider | None) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("strongroom.server") if provider is not None else None

    async def request(self, app: Asgi, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Let the application answer, inside a span. A continued trace is that of the `traceparent` header."""
        given = next((value for name, value in scope["headers"] if name == b"traceparent"), b"")
        match = _TRACEPARENT.fullmatch(given)
        if self._tracer is None:
            if match is not None:
                trace, span, flags = (part.decode() for part in match.groups())
                enter_trace(trace, span, bool(int(flags, 16) & 1))
            await app(scope, receive, send)
            return
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        method = scope["method"]
        status = 0

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with self._tracer.start_as_current_span(
            method,
            context=extract({"traceparent": given.decode("latin-1")}) if match is not None else None,
            kind=SpanKind.SERVER,
            attributes={"http.request.method": method, "strongroom.request_id": request_id_of(scope["headers"])},
        ) as span:
            context = span.get_span_context()
            enter_trace(f"{context.trace_id:032x}", f"{context.span_id:016x}", context.trace_flags.sampled)
            await app(scope, receive, noted)
            # The route's pattern, not the path: names of tenants and ids of keys stay out of the traces.
            route = VERIFY if scope["path"] == VERIFY else getattr(scope.get("route"), "path", None)
            if route is not None:
                span.update_name(f"{method} {route}")
                span.set_attribute("http.route", route)
            if status:
                span.set_attribute("http.response.status_code", status)
            if status >= 500:
                span.set_status(Status(StatusCode.ERROR))

    def close(self) -> None:
        """Send the spans that are not sent yet."""
        if self._provider is not None:
            self._provider.shutdown()


__all__ = ["ENDPOINTS", "Tracing", "provider", "wanted"]
