"""Metrics of several worker processes in one scrape: each worker writes its numbers to a folder, and any of them adds
them up.

A worker's counters outlive it, because a sum that falls looks like a restart to Prometheus. Its gauges do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
from prometheus_client.core import Metric

PUBLISH_EVERY_S = 5.0
"""How often a worker writes its numbers, which takes it some milliseconds: a scrape of another worker is at most this
old."""
GONE_AFTER_S = 20.0
"""A worker that has written nothing for this long is gone."""
_ENDED = "ended"
_log = logging.getLogger(__name__)


class _Sample(msgspec.Struct, array_like=True):
    name: str
    labels: dict[str, str]
    value: float


class _Family(msgspec.Struct, array_like=True):
    name: str
    help: str
    type: str
    samples: list[_Sample]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[_Family]).decode


class SharedMetrics:
    """The numbers of all workers that use one folder. `largest` names the gauges of which the largest counts; other
    gauges are added up."""

    def __init__(self, folder: str, collect: Callable[[], Iterable[Metric]], largest: Callable[[], set[str]]) -> None:
        self._folder = Path(folder)
        self._collect = collect
        self._largest = largest
        self._own = self._folder / str(os.getpid())
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._fold_ended()
        self._publish()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop. The counters are kept for the others."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
            self._publish()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PUBLISH_EVERY_S)
            self._publish()

    def _publish(self) -> list[_Family]:
        families = [_family(metric) for metric in self._collect()]
        try:
            _write(self._own, families)
        except OSError as error:  # a full disk must not end the worker, and the next attempt may succeed
            _log.warning("the metrics of this worker cannot be written: %s", error)
        return families

    def _fold_ended(self) -> None:
        """Add the counters of workers that are gone to one file, so that restarts do not leave ever more files."""
        with self._locked():
            gone = [path for path, age_s in self._files() if age_s > GONE_AFTER_S]
            if gone:
                ended = self._folder / _ENDED
                kept = _merged([_read(path) for path in (ended, *gone)], set())
                _write(ended, [family for family in kept if family.type != "gauge"])
                for path in gone:
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        descriptor = os.open(self._folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    def _files(self) -> list[tuple[Path, float]]:
        """The files of the other workers, and their ages in seconds."""
        found = []
        for path in self._folder.iterdir():
            if path.name.isdigit() and path != self._own:
                with contextlib.suppress(FileNotFoundError):
                    found.append((path, time.time() - path.stat().st_mtime))
        return found

    def collect(self) -> Iterable[Metric]:
        """The numbers of all workers: this one's as of now, the others' as of their last writing."""
        own = self._publish()  # so that no later scrape, of another worker, shows less than this one
        others = [_read(self._folder / _ENDED)]
        for path, age_s in self._files():
            families = _read(path)
            others.append(families if age_s <= GONE_AFTER_S else [one for one in families if one.type != "gauge"])
        for family in _merged([own, *others], self._largest()):
            metric = Metric(family.name, family.help, family.type)
            for sample in family.samples:
                metric.add_sample(sample.name, sample.labels, sample.value)
            yield metric


def _family(metric: Metric) -> _Family:
    samples = [_Sample(sample.name, sample.labels, sample.value) for sample in metric.samples]
    return _Family(metric.name, metric.documentation, metric.type, samples)


def _merged(workers: Iterable[list[_Family]], largest: set[str]) -> list[_Family]:
    families: dict[str, _Family] = {}
    values: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], _Sample]] = {}
    for worker in workers:
        for family in worker:
            families.setdefault(family.name, family)
            found = values.setdefault(family.name, {})
            for sample in family.samples:
                key = (sample.name, tuple(sorted(sample.labels.items())))
                before = found.get(key)
                value = sample.value
                if before is not None:
                    value = max(value, before.value) if family.name in largest else value + before.value
                found[key] = _Sample(sample.name, sample.labels, value)
    return [_Family(one.name, one.help, one.type, [*values[name].values()]) for name, one in families.items()]


def _write(path: Path, families: list[_Family]) -> None:
    new = path.with_name(f"{path.name}.new-{os.getpid()}")
    new.write_bytes(_encode(families))
    new.replace(path)  # a reader sees the old file or the new one


def _read(path: Path) -> list[_Family]:
    try:
        return _decode(path.read_bytes())
    except FileNotFoundError:
        return []


__all__ = ["GONE_AFTER_S", "PUBLISH_EVERY_S", "SharedMetrics"]
