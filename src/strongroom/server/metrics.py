"""Counters and histograms as plain numbers, so that counting costs next to nothing; Prometheus reads them."""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
MAX_SERIES = 2_000
"""Series of one family; further ones are counted under `other`."""


class Histogram:
    """How often something took how long."""

    __slots__ = ("counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        total, found = 0, []
        for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Metrics(Collector):
    """What this process has done since it started."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, str, int], int] = {}
        self.latency: dict[tuple[str, str], Histogram] = {}
        self.verified: dict[str, int] = {}
        self.verify_latency = Histogram()
        self.writes: dict[tuple[str, str], int] = {}
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        key = (method, route, status)
        if key not in self.requests and len(self.requests) >= MAX_SERIES:
            key = ("other", "other", status)
        self.requests[key] = self.requests.get(key, 0) + 1
        histogram = self.latency.get(key[:2])
        if histogram is None:
            histogram = self.latency[key[:2]] = Histogram()
        histogram.observe(seconds)

    def verification(self, code: str, seconds: float) -> None:
        self.verified[code] = self.verified.get(code, 0) + 1
        self.verify_latency.observe(seconds)

    def write(self, collection: str, action: str) -> None:
        key = (collection, action)
        self.writes[key] = self.writes.get(key, 0) + 1

    def gauge(self, name: str, help: str, value: Callable[[], float]) -> None:
        """A number that is asked for when the metrics are read."""
        self.gauges[name] = (help, value)

    def text(self) -> bytes:
        """The exposition, Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "strongroom_requests", "Requests answered.", labels=("method", "route", "status")
        )
        for (method, route, status), count in sorted(self.requests.items()):
            requests.add_metric((method, route, str(status)), count)
        yield requests
        latency = HistogramMetricFamily(
            "strongroom_request_seconds", "Time to the end of the answer.", labels=("method", "route")
        )
        for labels, histogram in sorted(self.latency.items()):
            latency.add_metric(labels, buckets=histogram.buckets(), sum_value=histogram.sum_s)
        yield latency
        verified = CounterMetricFamily("strongroom_verifications", "Verifications by their code.", labels=("code",))
        for code, count in sorted(self.verified.items()):
            verified.add_metric((code,), count)
        yield verified
        verify = HistogramMetricFamily("strongroom_verify_seconds", "Time that a verification took, durable.")
        verify.add_metric((), buckets=self.verify_latency.buckets(), sum_value=self.verify_latency.sum_s)
        yield verify
        writes = CounterMetricFamily(
            "strongroom_writes", "Changes committed by this process.", labels=("collection", "action")
        )
        for (collection, action), count in sorted(self.writes.items()):
            writes.add_metric((collection, action), count)
        yield writes
        for name, (help, value) in self.gauges.items():
            yield GaugeMetricFamily(name, help, value=value())
        info = GaugeMetricFamily("strongroom_process", "The process that these numbers are of.", labels=("pid",))
        info.add_metric((str(os.getpid()),), 1)
        yield info
