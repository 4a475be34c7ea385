"""A repeated failure is logged at once, then less and less often, and once more when it has ended."""

from __future__ import annotations

import logging

import pytest

from strongroom.retry_log import LONGEST_S, RetryLog


def test_an_hour_of_failures_logs_a_line_a_minute_and_its_end(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    caplog.set_level(logging.INFO)
    told = RetryLog(logging.getLogger("test"), "the journal cannot be read", lambda: now)
    told.succeeded()
    assert caplog.messages == []
    for _ in range(4 * 3_600):
        told.failed("no route")
        now += 0.25
    assert caplog.messages[:3] == [
        "the journal cannot be read: no route; trying again",
        "the journal cannot be read: no route (for 1 s, 5 times); trying again",
        "the journal cannot be read: no route (for 3 s, 13 times); trying again",
    ]
    assert 60 <= len(caplog.messages) <= 3_600 / LONGEST_S + 8
    told.succeeded()
    assert caplog.messages[-1] == "the journal cannot be read: over, after 3600.0 s and 14400 failures"
    told.failed("again")
    assert caplog.messages[-1] == "the journal cannot be read: again; trying again"
