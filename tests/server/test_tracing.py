"""Traces of a running server, as a collector receives them, and the trace in its log lines."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from strongroom.server import trace_context, tracing
from strongroom.server.logs import CloudLoggingFormatter, JsonFormatter
from tests.helpers.server_process import running
from tests.helpers.waiting import wait_without_loop

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARENT = {"traceparent": f"00-{TRACE}-{SPAN}-01"}


@dataclass
class Collector:
    """An OpenTelemetry collector on loopback, which keeps the spans that it receives."""

    url: str = ""
    spans: list[Any] = field(default_factory=list)

    def named(self, name: str) -> list[Any]:
        return [span for span in self.spans if span.name == name]

    def below(self, parent: Any) -> set[str]:
        """The names of all spans below one."""
        children = [span for span in self.spans if span.parent_span_id == parent.span_id]
        return {span.name for span in children}.union(*(self.below(span) for span in children))


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = ExportTraceServiceRequest()
            request.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            for resource in request.resource_spans:
                for scope in resource.scope_spans:
                    found.spans.extend(scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def test_the_three_trips_are_traced_with_the_stores_calls_below_them(tmp_path: Path, collector: Collector) -> None:
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.url, "OTEL_BSP_SCHEDULE_DELAY": "100"}
    with running(tmp_path, **environment) as server, server.client() as client:
        key = client.post("/v1/keys", json={"name": "n"}).json()["key"]
        client.post("/v1/keys/verify", json={"key": key}, headers=PARENT).raise_for_status()
        path = "/v1/tenants/secret-tenant/policies/secret-policy"
        client.put(path, json={"policy_type": "t", "policy_name": "n"}).raise_for_status()
        client.get("/v1/tenants/secret-tenant/policies").raise_for_status()
        client.get("/v1/audit").raise_for_status()
        wait_without_loop(lambda: bool(collector.named("GET /v1/audit")))
    (verified,) = collector.named("POST /v1/keys/verify")
    assert (verified.trace_id.hex(), verified.parent_span_id.hex()) == (TRACE, SPAN)
    (written,) = collector.named("PUT /v1/tenants/{tenant}/policies/{id}")
    assert "commit policies" in collector.below(written)
    (listed,) = collector.named("GET /v1/tenants/{tenant}/policies")
    assert "find policies" in collector.below(listed)
    told = "".join(str(span) for span in collector.spans)
    assert "secret" not in told, "names of tenants and ids stay out of the traces"
    assert key not in told


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
    ],
)
def test_traces_are_on_where_an_exporter_is_configured(environment: dict[str, str], wanted: bool) -> None:
    assert tracing.wanted(environment) is wanted


def test_cloud_loggings_lines_name_severity_and_the_trace_of_the_request(tmp_path: Path) -> None:
    environment = {
        "STRONGROOM_LOG_FORMAT": "cloud-logging",
        "STRONGROOM_ACCESS_LOG": "true",
        "GOOGLE_CLOUD_PROJECT_ID": "project-1",
    }
    with running(tmp_path, **environment) as server:
        with server.client() as client:
            client.get("/v1/keys", headers=PARENT).raise_for_status()
            client.get("/v1/keys").raise_for_status()
        _, _, err = server.stop()
    lines = [json.loads(line) for line in err.splitlines()]
    assert {line["severity"] for line in lines} == {"INFO"}
    traced, other = (line for line in lines if line["logger"] == "strongroom.access")
    assert traced["logging.googleapis.com/trace"] == f"projects/project-1/traces/{TRACE}"
    assert traced["logging.googleapis.com/spanId"] == SPAN
    assert traced["logging.googleapis.com/trace_sampled"] is True
    assert "logging.googleapis.com/trace" not in other


def test_a_line_outside_a_request_names_no_trace() -> None:
    record = logging.makeLogRecord({"msg": "hello", "levelname": "ERROR"})
    assert trace_context.current_trace() is None
    assert "trace_id" not in json.loads(JsonFormatter().format(record))
    line = json.loads(CloudLoggingFormatter(None).format(record))
    assert line["severity"] == "ERROR"
    assert not [name for name in line if name.startswith("logging.")]
