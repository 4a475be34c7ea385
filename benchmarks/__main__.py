"""`python -m benchmarks`: chooses what to measure, measures it in a folder of its own, and reports."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from . import report
from .harness import Benchmark, Plan

NAMES = (
    "verify", "verify_postgres", "read", "write", "usage", "usage_batch", "limits", "middleware", "store", "cache",
    "zipf", "postgres", "firestore", "manykeys", "revocation", "stalls", "sign_in", "audit_verify",
    "sealing", "sealing_lag", "proofs",
)  # fmt: skip
ROUNDS, SECONDS = 7, 1.5
QUICK_ROUNDS, QUICK_SECONDS = 2, 0.25


def main() -> int:
    """0: measured. 1: something could not be measured (the report says what). A missed target is not a failure."""
    options = _options()
    # Servers, workers and folders are let go of on the way out, so leave by an exception.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="strongroom-bench-", dir=options.dir) as folder:
        plan = Plan(
            folder,
            options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            options.seconds or (QUICK_SECONDS if options.quick else SECONDS),
            options.quick,
            report.to_terminal,
        )
        facts = report.machine(folder)
        benchmarks = [_run(name, plan) for name in options.only or NAMES]
        report.to_terminal("")
    if options.json:
        print(json.dumps(report.document(facts, plan, benchmarks), indent=2))
    else:
        print(report.text(facts, plan, benchmarks))
    return int(any(figure.unavailable for b in benchmarks for group in b.groups for figure in group.figures))


def _run(name: str, plan: Plan) -> Benchmark:
    run: Callable[[Plan], Benchmark] = import_module(f".{name}", __package__).run
    folder = Path(plan.folder) / name
    folder.mkdir()
    return run(replace(plan, folder=str(folder)))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures Strongroom beside a bare floor and a peer, in one run.",
        epilog="example: python -m benchmarks --only verify --only read --json",
    )
    parser.add_argument("--only", action="append", choices=NAMES, help="this benchmark; may be given several times")
    parser.add_argument("--quick", action="store_true", help="a smoke run: little data, short rounds")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of the table")
    parser.add_argument("--dir", type=Path, help="where data is written; a disk that really syncs (default: temporary)")
    parser.add_argument("--rounds", type=_positive(int), help=f"rounds of each contender (default {ROUNDS})")
    parser.add_argument("--seconds", type=_positive(float), help=f"seconds a round (default {SECONDS:g})")
    return parser.parse_args()


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError(f"found {text}, expected more than 0")
        return value

    return parse


if __name__ == "__main__":
    sys.exit(main())
