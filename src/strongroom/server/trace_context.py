"""The trace that the present request belongs to, for the lines that are logged while it is answered."""

from __future__ import annotations

import contextvars

_trace: contextvars.ContextVar[tuple[str, str, bool] | None] = contextvars.ContextVar("trace", default=None)


def current_trace() -> tuple[str, str, bool] | None:
    """The trace id, the span id (both hexadecimal), and whether the trace is sampled; None outside a traced request."""
    return _trace.get()


def enter_trace(trace_id: str, span_id: str, sampled: bool) -> None:
    """Say that this task and those that it starts answer a request of a trace."""
    _trace.set((trace_id, span_id, sampled))
