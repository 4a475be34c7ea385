"""Counters and histograms as plain numbers, because an increment on the hot path must be cheap; Prometheus reads
them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..storage.instrumented import Histogram, StoreMetrics
from .shared_metrics import SharedMetrics

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_SERIES = 2_000
"""Series of one family; further series are counted as `other`."""


VERIFIED = ("POST", "/v1/keys/verify", 200)
"""A verification counts once, by its code, to stay cheap; a scrape adds up the requests from these counts."""


class Metrics(Collector):
    """This process's counts since its start; with `share`, a scrape shows those of all workers of this server.
    `strongroom_process` names the processes that a scrape covers."""

    def __init__(self, store: StoreMetrics | None = None) -> None:
        self.store = store
        self.requests: dict[tuple[str, str, int], int] = {}
        self.latency: dict[tuple[str, str], Histogram] = {}
        self.verified: dict[str, int] = {}
        self.verify_latency = Histogram()
        self.writes: dict[tuple[str, str], int] = {}
        self.gauges: dict[str, tuple[str, Callable[[], float]]] = {}
        self._largest: set[str] = set()
        self.counters: dict[str, tuple[str, tuple[str, ...], Callable[[], Mapping[Any, float]]]] = {}
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def share(self, folder: str) -> SharedMetrics:
        """Add up the numbers of all workers that use this folder, from now on. Raises OSError."""
        shared = SharedMetrics(folder, self.collect, lambda: self._largest)
        self._registry.unregister(self)
        self._registry.register(shared)
        return shared

    def request(self, method: str, route: str, status: int, seconds: float) -> None:
        key = (method, route, status)
        if key not in self.requests and len(self.requests) >= MAX_SERIES:
            key = ("other", "other", status)
        self.requests[key] = self.requests.get(key, 0) + 1
        histogram = self.latency.get(key[:2])
        if histogram is None:
            histogram = self.latency[key[:2]] = Histogram()
        histogram.observe(seconds)

    def refused(self, status: int) -> None:
        """Count the status of a refused connection or an invalid request."""
        key = ("other", "unmatched", status)
        self.requests[key] = self.requests.get(key, 0) + 1

    def verification(self, code: str, seconds: float) -> None:
        self.verified[code] = self.verified.get(code, 0) + 1
        self.verify_latency.observe(seconds)

    def write(self, collection: str, action: str) -> None:
        key = (collection, action)
        self.writes[key] = self.writes.get(key, 0) + 1

    def gauge(self, name: str, help: str, value: Callable[[], float], *, largest: bool = False) -> None:
        """Register a number that is read at each scrape. Those of several workers are added up, or the `largest`
        counts."""
        self.gauges[name] = (help, value)
        if largest:
            self._largest.add(name)

    def counter(self, name: str, help: str, label: str, values: Callable[[], Mapping[str, float]]) -> None:
        """Register counts by one label, which are read at each scrape."""
        self.labelled_counter(name, help, (label,), lambda: {(value,): count for value, count in values().items()})

    def labelled_counter(
        self, name: str, help: str, labels: tuple[str, ...], values: Callable[[], Mapping[Any, float]]
    ) -> None:
        """Register counts by several labels, which are read at each scrape. The keys are tuples of the labels' values,
        and `()` without labels."""
        self.counters[name] = (help, labels, values)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def collect(self) -> Iterable[Metric]:
        requests = CounterMetricFamily(
            "strongroom_requests", "Requests answered.", labels=("method", "route", "status")
        )
        counts = {**self.requests}
        if answered := sum(self.verify_latency.counts):  # `self.verified` would include batches
            counts[VERIFIED] = counts.get(VERIFIED, 0) + answered
        for (method, route, status), count in sorted(counts.items()):
            requests.add_metric((method, route, str(status)), count)
        yield requests
        latency = HistogramMetricFamily(
            "strongroom_request_seconds", "Duration of a request, to the end of its answer.", labels=("method", "route")
        )
        latencies = {**self.latency}
        if answered:
            latencies[VERIFIED[:2]] = self.verify_latency + latencies.get(VERIFIED[:2], Histogram())
        for labels, histogram in sorted(latencies.items()):
            latency.add_metric(labels, buckets=histogram.buckets(), sum_value=histogram.sum_s)
        yield latency
        verified = CounterMetricFamily("strongroom_verifications", "Verifications by their code.", labels=("code",))
        for code, count in sorted(self.verified.items()):
            verified.add_metric((code,), count)
        yield verified
        verify = HistogramMetricFamily("strongroom_verify_seconds", "Duration of a durable verification.")
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
        for name, (help, names, values) in self.counters.items():
            family = CounterMetricFamily(name, help, labels=names)
            for labelled, number in sorted(values().items()):
                family.add_metric(labelled, number)
            yield family
        if self.store is not None:
            yield from store_families(self.store)
        info = GaugeMetricFamily("strongroom_process", "The process of these numbers.", labels=("pid",))
        info.add_metric((str(os.getpid()),), 1)
        yield info


def store_families(store: StoreMetrics) -> Iterable[Metric]:
    """Counts of the store's calls, by backend and collection: a series for each declared collection."""
    labels = ("backend", "collection", "operation")
    operations = CounterMetricFamily(
        "strongroom_store_operations", "Reads, and operations of committed batches.", labels=labels
    )
    for (collection, call), series in sorted(store.calls.items()):
        if call != "commit":
            operations.add_metric((store.backend, collection, call), series.count)
    for (collection, kind), count in sorted(store.operations.items()):
        operations.add_metric((store.backend, collection, kind), count)
    yield operations
    latency = HistogramMetricFamily(
        "strongroom_store_seconds", "Duration of a call of the store; one get in 16 is timed.", labels=labels
    )
    errors = CounterMetricFamily(
        "strongroom_store_errors", "Calls of the store that failed, conflicts aside.", labels=(*labels, "code")
    )
    for (collection, call), series in sorted(store.calls.items()):
        names = (store.backend, collection, call)
        latency.add_metric(names, buckets=series.latency.buckets(), sum_value=series.latency.sum_s)
        for code, count in sorted(series.errors.items()):
            errors.add_metric((*names, code), count)
    yield latency
    yield errors
    conflicts = CounterMetricFamily(
        "strongroom_store_conflicts",
        "Batches refused because a precondition failed or a document existed already.",
        labels=("backend", "collection"),
    )
    for collection, count in sorted(store.conflicts.items()):
        conflicts.add_metric((store.backend, collection), count)
    yield conflicts
