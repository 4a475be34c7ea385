"""Admission requests that wait, the groups that are decided together, and the batches that they commit in. Pure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, Protocol

import msgspec

from ..database import IdempotentOperation
from ..storage.port import MAX_OPERATIONS, Operation
from . import tuning
from .corrections import Special
from .lease import LeasedLimit, UsageLease
from .reservation_change import HoldChange
from .usage_state import AdmissionDecision, Cost, Subject, Subjects, UsageState


class KeyChanged(Exception):
    """The key or one of its quotas has changed or was removed since it was read: read it again and decide again. Never
    leaves the library."""


class Owner(Protocol):
    """Who is told what became of a request that has no future."""

    def recorded(self, request: AdmissionRequest) -> None:
        """The request is durable."""
        ...

    def failed(self, request: AdmissionRequest) -> None:
        """The request could not be committed, or its answer was lost."""
        ...

    def gone(self, request: AdmissionRequest) -> None:
        """The key, or the quota, was removed, and its usage with it."""
        ...

    async def described(self, id: str) -> Subject | None:
        """The present limits of a subject; None to go on with those of the request."""
        ...


class AdmissionRequest(msgspec.Struct, eq=False):
    """One use of a key that is to be decided. Without a future it is something that only has to be written: aggregated
    use, a usage lease to be renewed or returned, the lease of a dead process. Its `owner` is then told the outcome."""

    subjects: Subjects
    cost: Cost
    force: bool
    once: IdempotentOperation | None
    future: asyncio.Future[AdmissionDecision] | None
    count: int = 1
    used_at_us: int | None = None
    attempts: int = 0
    model: str | None = None
    route: str | None = None
    hold: HoldChange | None = None
    """The change of a reservation. What it writes commits with the request; if that fails, only this request does."""
    lease: Literal["renew", "return", "tell"] | None = None
    """A node's lease is to be renewed or returned; `tell`: events of crossed thresholds are still to be written."""
    special: Special | None = None
    lost_at: float = 0.0
    """By time.monotonic: when another node first committed before this request."""
    owner: Owner | None = None


class Group:
    """Requests that share subjects, directly or through others: they are decided in order, and commit together."""

    __slots__ = ("requests", "subjects")

    def __init__(self) -> None:
        self.requests: list[AdmissionRequest] = []
        self.subjects: dict[str, Subject] = {}
        """The subjects, by id."""


class DecidedGroup:
    """The requests of a group with their outcomes, and the operations that make these outcomes true: the checks, the
    usage documents, then what may happen only once."""

    __slots__ = (
        "also",
        "answers",
        "due",
        "event_chars",
        "events",
        "group",
        "operations",
        "returned",
        "states",
        "usage_leases",
    )  # fmt: skip

    def __init__(self, group: Group, answers: list[tuple[AdmissionRequest, AdmissionDecision]]) -> None:
        self.group = group
        self.answers = answers
        self.operations: list[Operation] = []
        self.states: dict[int, UsageState] = {}
        """The states that are written, by the index of their operation."""
        self.also: Mapping[int, AdmissionRequest] = {}
        """The requests whose own operation is at an index."""
        self.usage_leases: Sequence[tuple[UsageLease, list[tuple[LeasedLimit, int]]]] = ()
        """Usage leases that were recorded and granted, with what was spent of each limit."""
        self.returned: Sequence[UsageLease] = ()
        self.events: Sequence[str] = ()
        """The ids of the events that tell of crossed thresholds."""
        self.event_chars = 0
        self.due: Sequence[Subject] = ()
        """Subjects with crossings that are still to be told of."""


# --- Groups --------------------------------------------------------------------------------------------------------


def groups_of(
    requests: Iterable[AdmissionRequest], states: Mapping[str, UsageState]
) -> tuple[list[Group], list[AdmissionRequest]]:
    """The requests in groups that share no subject, and those for the next round, because a batch takes so many."""
    groups: dict[str, Group] = {}
    later: list[AdmissionRequest] = []
    for request in requests:
        subjects = request.subjects.all
        if len(subjects) == 1:
            (subject,) = subjects
            group = groups.get(subject.id)
            if group is None:
                group = groups[subject.id] = Group()
                group.subjects[subject.id] = subject
            elif (known := group.subjects[subject.id]) is not subject and subject.guard.expected > known.guard.expected:
                group.subjects[subject.id] = subject
            group.requests.append(request)
            continue
        group = _merged(groups, subjects)
        group.requests.append(request)
        for subject in subjects:
            before = group.subjects.get(subject.id)
            if before is None or subject.guard.expected > before.guard.expected:
                group.subjects[subject.id] = subject
            groups[subject.id] = group
    found: list[Group] = []
    for group in dict.fromkeys(groups.values()):
        cut, rest = _cut(group, states)
        found.append(cut)
        later += rest
    return found, later


def _merged(groups: dict[str, Group], subjects: Sequence[Subject]) -> Group:
    there = dict.fromkeys(group for subject in subjects if (group := groups.get(subject.id)) is not None)
    if not there:
        return Group()
    first, *others = there
    for other in others:
        first.requests += other.requests
        for subject_id, subject in other.subjects.items():
            known = first.subjects.get(subject_id)
            if known is None or subject.guard.expected > known.guard.expected:
                first.subjects[subject_id] = subject
            groups[subject_id] = first
    return first


def _cut(group: Group, states: Mapping[str, UsageState]) -> tuple[Group, list[AdmissionRequest]]:
    """As many of a group's requests as fit into one batch, and the rest."""
    most, once_most = tuning.MAX_GROUP_OPERATIONS, tuning.MAX_ONCE
    if len(group.requests) <= once_most and 2 * len(group.subjects) + len(group.requests) <= most:
        return group, []  # whatever they are
    once = sum(request.once is not None or request.hold is not None for request in group.requests)
    if once <= once_most and 2 * len(group.subjects) + once <= most:
        return group, []
    kept, rest = Group(), []
    operations = size = 0
    for request in group.requests:
        more = 2 * sum(subject.id not in kept.subjects for subject in request.subjects.all)
        more += request.once is not None or request.hold is not None
        chars = sum(
            states[subject.id].size
            for subject in request.subjects.all
            if subject.id not in kept.subjects and subject.id in states
        )
        if kept.requests and (operations + more > most or size + chars > tuning.MAX_BUNDLE_CHARS):
            rest.append(request)
            continue
        operations, size = operations + more, size + chars
        kept.requests.append(request)
        kept.subjects.update({subject.id: group.subjects[subject.id] for subject in request.subjects.all})
    return kept, rest


# --- Batches, answers ------------------------------------------------------------------------------------------------


def bundles_of(decided: Iterable[DecidedGroup]) -> list[list[DecidedGroup]]:
    """The decisions in as few batches as the port's limits allow, with room to spare."""
    bundles: list[list[DecidedGroup]] = []
    operations, size, most = MAX_OPERATIONS, 0, tuning.MAX_BUNDLE_CHARS
    for one in decided:
        more, chars = len(one.operations), one.event_chars
        for state in one.states.values():
            chars += state.size
        if operations + more > MAX_OPERATIONS or size + chars > most:
            bundles.append([])
            operations, size = 0, 0
        bundles[-1].append(one)
        operations += more
        size += chars
    return bundles


def operations_of(bundle: Iterable[DecidedGroup]) -> list[Operation]:
    return [operation for one in bundle for operation in one.operations]


def requests_of(bundle: Iterable[DecidedGroup]) -> list[AdmissionRequest]:
    return [request for one in bundle for request, _ in one.answers]


def answer(answers: Iterable[tuple[AdmissionRequest, AdmissionDecision]]) -> None:
    """Tell each caller, or each owner, the outcome, which is durable."""
    for request, outcome in answers:
        future = request.future
        if future is None:
            if request.owner is not None:
                request.owner.recorded(request)
        elif not future.done():
            future.set_result(outcome)


def fail(request: AdmissionRequest, error: Exception) -> None:
    """Tell a request's caller, or its owner, that it failed."""
    if request.future is None:
        if request.owner is not None:
            request.owner.failed(request)
    elif not request.future.done():
        request.future.set_exception(error)


__all__ = [
    "AdmissionRequest",
    "DecidedGroup",
    "Group",
    "KeyChanged",
    "Owner",
    "answer",
    "bundles_of",
    "fail",
    "groups_of",
    "operations_of",
    "requests_of",
]  # fmt: skip
