"""The preview of a decision, on states that are used for nothing else and never written. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from .lease import fold
from .usage_state import AdmissionDecision, Cost, Status, Subjects, UsageState


def previewed(
    subjects: Subjects, states: Sequence[UsageState], cost: Cost, now_us: int, model: str | None, route: str | None
) -> AdmissionDecision:
    """The decision that a request would get now. `states` are those of the subjects; they are changed."""
    now_us = max(state.moment(now_us) for state in states)
    statuses: list[Status] = []
    asked = []
    for subject, state in zip(subjects.all, states, strict=True):
        fold(state, subject.compiled_limits, now_us)
        compiled_limits = subject.asked(model, route)
        asked.append((state, compiled_limits, [(one, cost.get(one.resource, 0)) for one in compiled_limits]))
    allowed = all(state.fits(wanted, now_us) for state, _, wanted in asked)
    for state, compiled_limits, wanted in asked:
        if allowed:
            state.use(compiled_limits, cost, now_us)
            statuses += state.statuses(compiled_limits, now_us)
        else:
            statuses += state.denials(wanted, now_us)
    return AdmissionDecision(allowed, tuple(statuses), now_us)


__all__ = ["previewed"]
