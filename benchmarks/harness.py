"""Measures contenders in turn, each in a process of its own, and makes ratios of what stood side by side."""

from __future__ import annotations

import asyncio
import multiprocessing
import multiprocessing.connection
import signal
import sys
import traceback
from array import array
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import repeat
from statistics import median
from time import perf_counter, process_time
from typing import Any, Self

SETUP_TIMEOUT_S = 600.0
ROUND_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 20.0
WARM_UP_SHARE, WARM_UP_MOST_S = 0.2, 0.5
# An operation that never suspends (a read on the calling thread) would starve the loop of a whole round.
YIELD_EVERY = 64


class BenchmarkError(Exception):
    """A contender could not be measured; the message says why."""


# --- One round ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one contender. Latencies are of single operations; None where single ones were not timed.

    `cores` is the processor time that the measured process used, per second of wall time; None where unknown.
    `client_cores` is the same for the load generator, where there is one.
    """

    operations: int
    seconds: float
    p50_us: float | None = None
    p99_us: float | None = None
    cores: float | None = None
    client_cores: float | None = None

    @property
    def rate(self) -> float:
        return self.operations / self.seconds


def percentiles_us(seconds: Sequence[float]) -> tuple[float | None, float | None]:
    """The 50th and 99th percentile of durations in seconds, in microseconds (nearest rank)."""
    if not seconds:
        return None, None
    ordered = sorted(seconds)
    last = len(ordered) - 1
    return ordered[round(last * 0.50)] * 1e6, ordered[round(last * 0.99)] * 1e6


def warm_up_s(seconds: float) -> float:
    return min(seconds * WARM_UP_SHARE, WARM_UP_MOST_S)


async def closed_loop(operation: Callable[[], Awaitable[object]], seconds: float, callers: int) -> Sample:
    """Run `operation` over and over in `callers` tasks, each starting the next when its last is done."""
    await _phase(operation, warm_up_s(seconds), callers)
    return await _phase(operation, seconds, callers)


async def _phase(operation: Callable[[], Awaitable[object]], seconds: float, callers: int) -> Sample:
    latencies = array("d")
    begin_cpu, begin = process_time(), perf_counter()
    deadline = begin + seconds

    async def caller() -> None:
        for n in range(sys.maxsize):
            before = perf_counter()
            if before >= deadline:
                return
            await operation()
            latencies.append(perf_counter() - before)
            if n % YIELD_EVERY == YIELD_EVERY - 1:
                await asyncio.sleep(0)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(callers):
            tasks.create_task(caller())
    elapsed, cpu = perf_counter() - begin, process_time() - begin_cpu
    return Sample(len(latencies), elapsed, *percentiles_us(latencies), cpu / elapsed)


def tight_loop(operation: Callable[[], object], seconds: float, *, each: int = 1, block: int = 1) -> Sample:
    """Run a plain function over and over. A call counts as `each` operations.

    With `block` > 1 only blocks are timed, so that reading the clock does not weigh on very short operations; then
    there are no latencies.
    """
    end = perf_counter() + warm_up_s(seconds)
    while perf_counter() < end:
        operation()
    latencies = array("d")
    calls = 0
    begin_cpu, begin = process_time(), perf_counter()
    deadline = begin + seconds
    while (before := perf_counter()) < deadline:
        for _ in repeat(None, block):
            operation()
        calls += block
        if block == 1:
            latencies.append(perf_counter() - before)
    elapsed, cpu = perf_counter() - begin, process_time() - begin_cpu
    return Sample(calls * each, elapsed, *percentiles_us(latencies), cpu / elapsed)


@dataclass(frozen=True, slots=True)
class Job:
    """What a worker is asked to measure: the name of an operation, for so long, by so many callers at once."""

    what: str
    seconds: float
    callers: int = 1


# --- A process per contender ----------------------------------------------------------------------------------

Round = Callable[[Any], Awaitable[Sample]]
Setup = Callable[..., AbstractAsyncContextManager[Round]]


@dataclass(frozen=True, slots=True)
class _Failure:
    text: str
    trace: str


class Worker:
    """A process that sets a contender up once, then measures a round for each job it is given.

    Processes of their own keep one contender's heap, threads and event loop out of another's figures. A worker that
    is not in a round waits on a pipe. It ends when the pipe closes, so also when this process is killed.
    """

    def __init__(self, setup: Setup, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_worker_main, args=(theirs, setup, arguments), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._receive(SETUP_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def __call__(self, job: Any) -> Sample:
        """Measure one round. Raises BenchmarkError with the reason if it failed."""
        self._pipe.send(job)
        sample = self._receive(ROUND_TIMEOUT_S)
        assert isinstance(sample, Sample)
        return sample

    def _receive(self, timeout_s: float) -> Any:
        try:
            if not self._pipe.poll(timeout_s):
                raise BenchmarkError(f"no answer within {timeout_s:.0f} s")
            answer = self._pipe.recv()
        except (EOFError, ConnectionError):
            raise BenchmarkError("its process ended") from None
        if isinstance(answer, _Failure):
            raise BenchmarkError(answer.text) from Exception(answer.trace)
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(STOP_TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _worker_main(pipe: multiprocessing.connection.Connection, setup: Setup, arguments: tuple[Any, ...]) -> None:
    import uvloop

    # Ctrl-C reaches the whole group; the parent closes the pipe, which ends the round in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, ConnectionError):
        try:
            uvloop.run(_worker_rounds(pipe, setup, arguments))
        except Exception as error:
            pipe.send(_failure(error))


async def _worker_rounds(pipe: multiprocessing.connection.Connection, setup: Setup, arguments: tuple[Any, ...]) -> None:
    async with setup(*arguments) as measure:
        pipe.send(None)
        while True:
            try:
                job = await asyncio.to_thread(pipe.recv)
            except (EOFError, ConnectionError):
                return
            try:
                answer: Sample | _Failure = await measure(job)
            except Exception as error:
                answer = _failure(error)
            pipe.send(answer)


def _failure(error: Exception) -> _Failure:
    reason: BaseException = error
    while isinstance(reason, BaseExceptionGroup):  # what failed, not the task group around it
        reason = reason.exceptions[0]
    text = str(reason) if isinstance(reason, BenchmarkError) else f"{type(reason).__name__}: {reason}"
    return _Failure(text, "".join(traceback.format_exception(error)))


# --- Rounds in turn, and what comes of them --------------------------------------------------------------------


class Role(StrEnum):
    OURS = "ours"
    FLOOR = "floor"
    PEER = "peer"


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of a table: `measure(seconds)` gives a round. `unavailable` says why there is none."""

    name: str
    role: Role
    measure: Callable[[float], Sample] | None
    unavailable: str = ""


@dataclass(frozen=True, slots=True)
class Started:
    """A worker that was set up, or why it could not be; the other contenders are measured all the same."""

    worker: Worker | None
    why: str = ""

    def contender(self, name: str, role: Role, what: str, callers: int = 1) -> Contender:
        """A line of a table: each round is `Job(what, seconds, callers)` for the worker."""
        worker = self.worker
        if worker is None:
            return Contender(name, role, None, self.why)
        return Contender(name, role, lambda seconds: worker(Job(what, seconds, callers)))


def start(stack: ExitStack, plan: Plan, what: str, setup: Setup, *arguments: Any) -> Started:
    """Set a worker up, to be closed with `stack`."""
    plan.progress(f"setting up {what}")
    try:
        return Started(stack.enter_context(Worker(setup, *arguments)))
    except BenchmarkError as error:
        return Started(None, str(error))


@dataclass(frozen=True, slots=True)
class Target:
    """What a group must reach; exactly one of three is given.

    `of_floor`: the rate of `name` is at least this part of the floor's, in the same run. A rate in itself is no target:
    it belongs to the machine. `percent`: the figure is a part of 100, and at least this. `at_most`: the figure is a
    time that somebody waits, and at most this in every round.
    """

    name: str
    of_floor: float | None = None
    percent: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if [self.of_floor, self.percent, self.at_most].count(None) != 2:
            raise ValueError(f"the target of {self.name!r}: expected one of of_floor, percent and at_most")

    def met(self, reached: float) -> bool:
        if self.at_most is not None:
            return reached <= self.at_most
        return reached >= (self.of_floor if self.of_floor is not None else self.percent or 0.0)

    def bound(self, unit: str) -> str:
        """The target in words; `unit` is the benchmark's."""
        if self.at_most is not None:
            return f"at most {self.at_most:,g} {unit}"
        return f"at least {self.percent:g} %" if self.of_floor is None else f"at least {self.of_floor:g} of the floor"


@dataclass(frozen=True, slots=True)
class Figure:
    """What one contender's rounds came to. Ratios are medians of the ratios of neighbouring rounds."""

    name: str
    role: Role
    rate: float | None = None
    lowest: float | None = None
    highest: float | None = None
    of_floor: float | None = None
    of_peer: float | None = None
    p50_us: float | None = None
    p99_us: float | None = None
    cores: float | None = None
    client_cores: float | None = None
    unavailable: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """Contenders measured in turn, so that their figures may be compared."""

    title: str
    figures: tuple[Figure, ...]
    targets: tuple[Target, ...] = ()

    def reached(self, target: Target) -> float | None:
        for figure in self.figures:
            if figure.name == target.name and target.at_most is not None:
                return figure.highest
            if figure.name == target.name:
                return figure.rate if target.of_floor is None else figure.of_floor
        return None


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One benchmark's result: what is counted, what is compared and what is not, and the groups."""

    name: str
    unit: str
    labels: tuple[str, ...]
    groups: tuple[Group, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to measure, over how much data, and where."""

    folder: str
    rounds: int
    seconds: float
    quick: bool
    progress: Callable[[str], None] = field(default=lambda _: None)


def side_by_side(plan: Plan, title: str, contenders: Sequence[Contender], targets: Sequence[Target] = ()) -> Group:
    """Measure the contenders in turn, round after round, every other round in reverse, so that drift cancels."""
    rounds: dict[str, list[Sample]] = {c.name: [] for c in contenders}
    failed: dict[str, str] = {c.name: c.unavailable for c in contenders if c.measure is None}
    for number in range(plan.rounds):
        for contender in contenders if number % 2 == 0 else reversed(contenders):
            if contender.name in failed or contender.measure is None:
                continue
            plan.progress(f"{title}: round {number + 1} of {plan.rounds}, {contender.name}")
            try:
                rounds[contender.name].append(contender.measure(plan.seconds))
            except BenchmarkError as error:
                failed[contender.name] = str(error)
    floor = _rates_of(Role.FLOOR, contenders, rounds, failed)
    peer = _rates_of(Role.PEER, contenders, rounds, failed)
    figures = []
    for contender in contenders:
        if contender.name in failed:
            figures.append(Figure(contender.name, contender.role, unavailable=failed[contender.name]))
            continue
        figure = _figure(contender, rounds[contender.name])
        rates = [sample.rate for sample in rounds[contender.name]]
        if floor and contender.role is not Role.FLOOR:
            figure = replace(figure, of_floor=_ratio(rates, floor))
        if peer and contender.role is Role.OURS:
            figure = replace(figure, of_peer=_ratio(rates, peer))
        figures.append(figure)
    return Group(title, tuple(figures), tuple(targets))


def _rates_of(
    role: Role, contenders: Sequence[Contender], rounds: dict[str, list[Sample]], failed: dict[str, str]
) -> list[float]:
    for contender in contenders:
        if contender.role is role and contender.name not in failed:
            return [sample.rate for sample in rounds[contender.name]]
    return []


def _ratio(rates: Sequence[float], beside: Sequence[float]) -> float:
    return median(rate / other for rate, other in zip(rates, beside, strict=True))


def _figure(contender: Contender, samples: Sequence[Sample]) -> Figure:
    rates = [sample.rate for sample in samples]

    def middle(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    return Figure(
        contender.name,
        contender.role,
        rate=median(rates),
        lowest=min(rates),
        highest=max(rates),
        p50_us=middle([s.p50_us for s in samples]),
        p99_us=middle([s.p99_us for s in samples]),
        cores=middle([s.cores for s in samples]),
        client_cores=middle([s.client_cores for s in samples]),
    )
