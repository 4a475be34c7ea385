"""One scrape shows all workers: counters are added up and outlive their worker, gauges do not."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from strongroom.server import shared_metrics
from strongroom.server.metrics import Metrics
from strongroom.server.shared_metrics import GONE_AFTER_S, SharedMetrics


def families(count: float, level: float) -> list[Metric]:
    counter = CounterMetricFamily("calls", "Calls.", labels=("route",))
    counter.add_metric(("/a",), count)
    histogram = HistogramMetricFamily("seconds", "Duration.")
    histogram.add_metric((), buckets=[("1.0", count), ("+Inf", count)], sum_value=count)
    return [
        counter,
        histogram,
        GaugeMetricFamily("open", "Open.", value=level),
        GaugeMetricFamily("behind", "Behind.", value=level),
    ]


def worker(folder: Path, pid: int, monkeypatch: pytest.MonkeyPatch, metrics: list[Metric]) -> SharedMetrics:
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: pid)
        return SharedMetrics(str(folder), lambda: metrics, lambda: {"behind"})


def values(found: Iterable[Metric]) -> dict[str, float]:
    return {sample.name: sample.value for metric in found for sample in metric.samples if "le" not in sample.labels}


def test_counters_and_gauges_are_added_up_and_of_a_delay_the_largest_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(tmp_path, 101, monkeypatch, families(3, 2))
    worker(tmp_path, 102, monkeypatch, families(4, 5))._publish()
    found = values(one.collect())
    assert found == {"calls_total": 7, "seconds_count": 7, "seconds_sum": 7, "open": 7, "behind": 5}


def test_the_counters_of_a_worker_that_is_gone_stay_and_its_gauges_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = worker(tmp_path, 101, monkeypatch, families(3, 2))
    for pid in (102, 103):
        worker(tmp_path, pid, monkeypatch, families(4, 50))._publish()
        old = os.stat(tmp_path / str(pid)).st_mtime - GONE_AFTER_S - 1
        os.utime(tmp_path / str(pid), (old, old))
    expected = {"calls_total": 11, "seconds_count": 11, "seconds_sum": 11, "open": 2, "behind": 2}
    assert values(one.collect()) == expected
    one._fold_ended()
    assert {path.name for path in tmp_path.iterdir()} == {"101", "ended", "lock"}
    assert values(one.collect()) == expected
    one._fold_ended()
    assert values(one.collect()) == expected


def test_a_worker_that_cannot_write_its_numbers_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = worker(tmp_path / "gone", 101, monkeypatch, families(3, 2))
    one._publish()
    assert "cannot be written" in caplog.text


def test_a_scrape_of_the_metrics_is_that_of_all_workers_once_they_are_shared(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.request("GET", "/a", 200, 0.01)
    assert b'strongroom_requests_total{method="GET",route="/a",status="200"} 1.0' in metrics.text()
    metrics.share(str(tmp_path))
    other = Metrics()
    other.request("GET", "/a", 200, 0.01)
    (tmp_path / "99999999").write_bytes(
        shared_metrics._encode([shared_metrics._family(family) for family in other.collect()])
    )
    assert b'strongroom_requests_total{method="GET",route="/a",status="200"} 2.0' in metrics.text()
