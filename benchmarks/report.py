"""Says where it was measured and what came out: one plain-text table, or one JSON document."""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

from .harness import Benchmark, Figure, Plan, Role

PACKAGES = ("apsw", "aiosqlite", "sqlalchemy", "advanced-alchemy", "pydantic", "uvicorn", "uvloop", "httptools")
FSYNC_PROBE_S = 0.3
# No disk that keeps its word is faster; memory file systems answer at once.
FASTEST_HONEST_FSYNC_PER_S = 150_000
NAME_WIDTH = 64
BUSY_LOAD_PER_CORE = 0.3


def machine(folder: str) -> dict[str, Any]:
    """The facts without which the figures mean nothing."""
    import apsw

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": usable,
        "load_before": round(os.getloadavg()[0], 2),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": {"strongroom and floor (apsw)": apsw.sqlite_lib_version(), "peer (sqlite3)": sqlite3.sqlite_version},
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "file_system": _file_system(folder),
        "fdatasync_per_s": round(_fdatasyncs_per_s(folder)),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def _file_system(folder: str) -> str:
    """The type of the file system that holds `folder`, where the system tells."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return "unknown"
    path = Path(folder).resolve()
    holding = [(len(where), kind) for _, where, kind, *_ in mounts if path.is_relative_to(where)]
    return max(holding)[1] if holding else "unknown"


def _fdatasyncs_per_s(folder: str) -> float:
    sync = getattr(os, "fdatasync", os.fsync)
    with tempfile.TemporaryFile(dir=folder) as file:
        done, begin = 0, perf_counter()
        while perf_counter() - begin < FSYNC_PROBE_S:
            os.pwrite(file.fileno(), b"x" * 4096, 0)
            sync(file.fileno())
            done += 1
        return done / (perf_counter() - begin)


def syncs_nothing(facts: dict[str, Any]) -> bool:
    """Whether the folder is on a file system where durability costs nothing, so that the figures would lie."""
    in_memory = facts["file_system"] in ("tmpfs", "ramfs")
    return in_memory or facts["fdatasync_per_s"] > FASTEST_HONEST_FSYNC_PER_S


# --- As JSON --------------------------------------------------------------------------------------------------


def document(facts: dict[str, Any], plan: Plan, benchmarks: Sequence[Benchmark]) -> dict[str, Any]:
    """Everything that the table says, for a program."""
    results = []
    for benchmark in benchmarks:
        result = asdict(benchmark)
        for group, shown in zip(benchmark.groups, result["groups"], strict=True):
            for target, entry in zip(group.targets, shown["targets"], strict=True):
                reached = group.reached(target)
                entry["reached"] = reached
                entry["met"] = reached is not None and target.met(reached)
        results.append(result)
    how = {"rounds": plan.rounds, "seconds_a_round": plan.seconds, "quick": plan.quick}
    return {"machine": facts, "measured": how, "benchmarks": results}


# --- As text --------------------------------------------------------------------------------------------------


def text(facts: dict[str, Any], plan: Plan, benchmarks: Sequence[Benchmark]) -> str:
    """The plain-text report."""
    packages = ", ".join(f"{name} {found}" for name, found in facts["packages"].items())
    engines = ", ".join(f"{found} for {who}" for who, found in facts["sqlite"].items())
    sync = f"{facts['file_system']}, {facts['fdatasync_per_s']:,} fdatasyncs/s"
    lines = [
        f"Machine   {facts['system']}, {facts['cores']} cores, {facts['processor']}; load {facts['load_before']}",
        f"Software  {facts['python']}; SQLite {engines}; {packages}",
        f"Disk      {sync}" + ("; NOTHING IS SYNCED HERE: write figures mean nothing" if syncs_nothing(facts) else ""),
        f"Measured  in turn, {plan.rounds} rounds of {plan.seconds:g} s each; rates and latencies are medians of the "
        "rounds, ratios medians of the ratios of neighbouring rounds",
    ]
    if facts["load_before"] > BUSY_LOAD_PER_CORE * (facts["cores"] or 1):
        lines.append(
            "          BUSY: other work ran here; rates are too low, and ratios of what waits for the disk too"
        )
    if plan.quick:
        lines.append("          QUICK: a smoke run on little data; not figures to publish")
    for benchmark in benchmarks:
        lines += ["", *_benchmark(benchmark)]
    return "\n".join(lines)


def _benchmark(benchmark: Benchmark) -> list[str]:
    lines = [f"== {benchmark.name}"]
    lines += [f"   {label}" for label in benchmark.labels]
    head = (
        f"{benchmark.unit:>16} {'lowest – highest':>20} {'× floor':>8} {'× peer':>7} {'p50 ms':>8} {'p99 ms':>8}  cores"
    )
    for group in benchmark.groups:
        lines += ["", f"   {group.title:<{NAME_WIDTH}}{head}"]
        lines += [f"   {_figure(figure)}" for figure in group.figures]
        for target in group.targets:
            reached = group.reached(target)
            verdict = "not measured" if reached is None else "met" if target.met(reached) else "MISSED"
            lines.append(f"   target: {target.name}, {target.bound(benchmark.unit)}: {verdict}")
    return lines


def _figure(figure: Figure) -> str:
    name = f"{figure.name} ({figure.role})" if figure.role is not Role.OURS else figure.name
    if figure.rate is None:
        return f"{name:<{NAME_WIDTH}} could not be measured: {figure.unavailable}"
    span = f"{figure.lowest or 0:,.0f} – {figure.highest or 0:,.0f}"
    cores = "–" if figure.cores is None else f"{figure.cores:.2f}"
    line = (
        f"{name:<{NAME_WIDTH}}{figure.rate:>16,.0f} {span:>20} {_number(figure.of_floor, '.3f'):>8} "
        f"{_number(figure.of_peer, '.1f'):>7} {_ms(figure.p50_us):>8} {_ms(figure.p99_us):>8} {cores:>6}"
    )
    if figure.client_cores is not None:
        line += f"  (load generator {figure.client_cores:.2f})"
    return line


def _number(value: float | None, shape: str) -> str:
    return "–" if value is None else format(value, shape)


def _ms(microseconds: float | None) -> str:
    return "–" if microseconds is None else f"{microseconds / 1_000:.3f}"


def to_terminal(message: str) -> None:
    """Progress on standard error, on one line, when that is a terminal."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{message[:100]}")
        sys.stderr.flush()
