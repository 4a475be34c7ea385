"""The benchmarks: ratios of interleaved rounds, no wrong answer is counted, and nothing is left running."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from benchmarks import load, report
from benchmarks.harness import (
    Benchmark,
    BenchmarkError,
    Contender,
    Job,
    Plan,
    Role,
    Round,
    Sample,
    Target,
    Worker,
    closed_loop,
    percentiles_us,
    side_by_side,
)
from benchmarks.servers import bare_server
from tests.helpers.paths import ROOT
from tests.helpers.waiting import PATIENCE_S

GOOD = b'{"valid": true, "code": "VALID"}'
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def _scripted(name: str, role: Role, rates: list[int], order: list[str]) -> Contender:
    turn = iter(rates)

    def measure(seconds: float) -> Sample:
        order.append(name)
        return Sample(next(turn), 1.0)

    return Contender(name, role, measure)


def _plan(folder: Path, rounds: int) -> Plan:
    return Plan(str(folder), rounds, 0.1, quick=True)


def test_a_ratio_is_the_median_of_neighbouring_rounds_and_every_other_round_is_reversed(tmp_path: Path) -> None:
    order: list[str] = []
    ours = _scripted("ours", Role.OURS, [50, 10, 60], order)
    floor = _scripted("floor", Role.FLOOR, [100, 20, 400], order)  # the machine slowed, then sped up
    group = side_by_side(_plan(tmp_path, 3), "group", [ours, floor], [Target("ours", of_floor=0.5)])
    assert order == ["ours", "floor", "floor", "ours", "ours", "floor"]
    assert group.figures[0].rate == 50
    assert group.figures[0].of_floor == 0.5
    assert group.reached(group.targets[0]) == 0.5


def test_a_contender_that_fails_is_reported_and_the_others_are_measured(tmp_path: Path) -> None:
    def fail(seconds: float) -> Sample:
        raise BenchmarkError("it broke")

    contenders = [
        Contender("ours", Role.OURS, fail),
        Contender("absent", Role.PEER, None, "not installed"),
        _scripted("floor", Role.FLOOR, [5, 5], []),
    ]
    plan = _plan(tmp_path, 2)
    group = side_by_side(plan, "group", contenders, [Target("ours", of_floor=1)])
    assert [f.unavailable for f in group.figures] == ["it broke", "not installed", ""]
    assert group.figures[2].rate == 5
    benchmark = Benchmark("read", "reads/s", (), (group,))
    facts = report.machine(str(tmp_path))
    text = report.text(facts, plan, [benchmark])
    assert "could not be measured: it broke" in text
    assert "not measured" in text
    document = json.loads(json.dumps(report.document(facts, plan, [benchmark])))
    assert document["benchmarks"][0]["groups"][0]["targets"][0]["met"] is False


def test_a_rate_in_itself_is_no_target() -> None:
    with pytest.raises(ValueError, match="expected one of of_floor, percent and at_most"):
        Target("ours")
    with pytest.raises(ValueError, match="expected one of of_floor, percent and at_most"):
        Target("ours", of_floor=0.5, at_most=20)
    assert Target("ours", of_floor=0.5).bound("reads/s") == "at least 0.5 of the floor"
    assert Target("ours", at_most=250).bound("ms") == "at most 250 ms"
    assert [Target("ours", of_floor=0.5).met(reached) for reached in (0.4, 0.5)] == [False, True]
    assert [Target("ours", percent=85).met(reached) for reached in (80, 85)] == [False, True]
    assert [Target("ours", at_most=250).met(reached) for reached in (250, 251)] == [True, False]


def test_percentiles_use_the_nearest_rank() -> None:
    assert percentiles_us([n / 1e6 for n in range(101)]) == pytest.approx((50, 99))
    assert percentiles_us([]) == (None, None)


async def test_the_closed_loop_keeps_as_many_calls_in_flight_as_there_are_callers() -> None:
    now = most = 0

    async def operation() -> None:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.001)
        now -= 1

    sample = await closed_loop(operation, 0.1, 8)
    assert most == 8
    assert sample.operations > 8
    assert sample.p99_us is not None
    assert sample.p99_us >= 1_000


# --- The load generator ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _serving(answers: Callable[[int], bytes], *, pieces: bool = False) -> AsyncIterator[int]:
    """A server whose n-th answer is `answers(n)`, in two pieces if asked. Gives its port."""
    count = 0
    connected: set[asyncio.StreamWriter] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        connected.add(writer)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(length)
                answer = answers(count)
                count += 1
                if pieces:
                    writer.write(answer[:30])
                    await asyncio.sleep(0.001)
                    answer = answer[30:]
                writer.write(answer)
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for writer in connected:
            writer.close()
        await server.wait_closed()


def _answer(body: bytes, status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


def _load(port: int) -> load.Load:
    request = load.post("/v1/keys/verify", {"key": "k"}, host="x", bearer="b")
    return load.Load("127.0.0.1", port, (request,), 4, 0.2, os.getpid())


@pytest.mark.parametrize("pieces", [False, True])
async def test_the_load_generator_counts_whole_answers(pieces: bool) -> None:
    asked = 0

    def answers(number: int) -> bytes:
        nonlocal asked
        asked = number + 1
        return _answer(GOOD)

    async with _serving(answers, pieces=pieces) as port:
        sample = await load.run(_load(port))
    assert 10 < sample.operations < asked
    assert sample.p50_us is not None


@pytest.mark.parametrize(
    "wrong", [_answer(b'{"valid": false}'), _answer(GOOD, b"503 Service Unavailable")], ids=["not valid", "not 200"]
)
async def test_one_wrong_answer_fails_the_round(wrong: bytes) -> None:
    async with _serving(lambda number: wrong if number == 40 else _answer(GOOD)) as port:
        with pytest.raises(BenchmarkError, match="a wrong answer under load"):
            await load.run(_load(port))


async def test_a_key_that_is_not_valid_is_found_before_the_load() -> None:
    async with _serving(lambda _: _answer(b'{"valid": false}')) as port:
        with pytest.raises(BenchmarkError, match="expected a valid key"):
            await load.run(_load(port))


@pytest.mark.server
async def test_the_floor_server_answers_and_ends_with_its_block(tmp_path: Path) -> None:
    with bare_server(tmp_path, ["a", "k"]) as server:
        sample = await load.run(_load(server.port))
        assert sample.operations > 0
    with pytest.raises(ProcessLookupError):
        os.kill(server.pid, 0)


# --- Workers --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _counting(start: int) -> AsyncIterator[Round]:
    async def measure(job: Job) -> Sample:
        if job.what == "break":
            raise ValueError("broken on purpose")
        return Sample(start + job.callers, job.seconds)

    yield measure


def test_a_worker_measures_or_says_why_it_cannot() -> None:
    with Worker(_counting, 10) as worker:
        assert worker(Job("any", 2.0, 5)).rate == 7.5
        with pytest.raises(BenchmarkError, match="ValueError: broken on purpose"):
            worker(Job("break", 1.0))
        assert worker(Job("any", 1.0)).rate == 11
    with pytest.raises(OSError, match="closed"):
        worker(Job("any", 1.0))


@pytest.mark.server
def test_a_quick_run_reports_every_figure_and_leaves_no_files(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "store", "--json", "--dir", str(tmp_path)]
    done = subprocess.run(  # the status is asserted below
        command, check=False, cwd=ROOT, capture_output=True, text=True, timeout=8 * PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    assert [b["name"] for b in result["benchmarks"]] == ["store"]
    assert all(f["rate"] > 0 for b in result["benchmarks"] for g in b["groups"] for f in g["figures"])
    assert result["machine"]["sqlite"]
    assert list(tmp_path.iterdir()) == []
