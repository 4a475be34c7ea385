"""The decision on the requests of one group, and the operations that must commit with it. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from ..database import IdempotentOperation
from ..errors import Conflict, InvalidInput, Problem
from ..storage.port import MAX_OPERATIONS, Check, Create, Operation, Patch, Put
from . import tuning
from .admission import AdmissionRequest, DecidedGroup, Group, KeyChanged, fail
from .corrections import (
    AggregatedUse,
    Backdate,
    BeginRefills,
    DeadLease,
    Refund,
    Special,
    add_once,
    begin_refills,
    counting,
    refill_started,
    take_back,
)
from .counters import SATURATED
from .idempotent_admission import EarlierAdmission, kept_statuses, statuses_kept
from .lease import UsageLease, fold, recover
from .reservation_change import HoldChange, HoldEnded
from .thresholds import Crossing, crossed, untold
from .usage_state import (
    CONCURRENCY,
    NAME,
    AdmissionDecision,
    CompiledLimit,
    Cost,
    Status,
    Subject,
    Subjects,
    UsageState,
)
from .windows import Limit

KEYS = "api_keys"


class Watcher(Protocol):
    """Who is told when the use of a limit crosses a threshold."""

    def thresholds(self, tenant: str, limit: Limit) -> tuple[int, ...]:
        """The thresholds (percent) of a limit that anyone wants to be told of."""
        ...

    def on_crossing(self, crossing: Crossing) -> Sequence[Put]:
        """The operations that commit with a crossing."""
        ...


class Round:
    """What all decisions of one round of the group commit share. `usage_leases` are this node's, `repeated` the
    idempotent requests that were admitted before."""

    __slots__ = ("lease_us", "now_us", "repeated", "states", "usage_leases", "watcher")

    def __init__(
        self,
        states: Mapping[str, UsageState],
        now_us: int,
        *,
        usage_leases: Mapping[str, UsageLease] | None = None,
        lease_us: int | None = None,
        repeated: dict[str, EarlierAdmission] | None = None,
        watcher: Watcher | None = None,
    ) -> None:
        self.states = states
        self.now_us = now_us
        self.usage_leases = usage_leases if usage_leases is not None else {}
        self.lease_us = lease_us
        self.repeated = repeated if repeated is not None else {}
        self.watcher = watcher


class _Entry:
    """One subject of the group in this decision."""

    __slots__ = ("asked", "changed", "now_us", "returning", "state", "subject")

    def __init__(self, subject: Subject, state: UsageState, now_us: int) -> None:
        self.subject = subject
        self.state = state
        self.now_us = now_us
        """The moment of this state alone: a subject that was charged at a wrong time does not move the others."""
        self.changed = False
        self.returning = False
        self.asked: dict[str, int] | None = None
        """The most units that one request of this group asks of each limit: the size of the next lease."""


class GroupDecision:
    """Decides the requests of one group, in order."""

    __slots__ = ("_answers", "_due", "_entries", "_extra", "_group", "_guards", "_round", "_watched")

    def __init__(self, group: Group, round: Round) -> None:
        self._group = group
        self._round = round
        states, now_us = round.states, round.now_us
        self._entries: dict[str, _Entry] = {}
        for id, subject in group.subjects.items():
            state = states[id]
            state.seen_us = max(state.moment(now_us), state.seen_us)
            self._entries[id] = _Entry(subject, state, state.seen_us)
        self._watched: list[tuple[_Entry, CompiledLimit, tuple[int, ...], int]] = []
        """Limits with watched thresholds, and their recorded use before this decision."""
        self._due = False
        """Whether events of earlier crossings are still to be written."""
        self._guards: dict[tuple[str, str], Check] = {}
        self._extra: list[tuple[Operation, AdmissionRequest | None]] = []
        self._answers: list[tuple[AdmissionRequest, AdmissionDecision]] = []

    def decided(self) -> DecidedGroup:
        """The outcome of every request of the group. Nothing has to commit if all are denied."""
        round = self._round
        if round.watcher is not None:
            self._watch(round.watcher)
        for id, entry in self._entries.items():
            state, compiled_limits, now_us = entry.state, entry.subject.compiled_limits, entry.now_us
            state.kept = _NOTHING_KEPT
            if round.usage_leases and (usage_lease := round.usage_leases.get(id)) is not None:
                entry.changed = usage_lease.record(state, now_us)
                state.kept = usage_lease.kept(compiled_limits)
            if state.due:
                self._due = True
            if state.leases:
                fold(state, compiled_limits, now_us)
        for request in self._group.requests:
            self._decide(request)
        return self._commitment()

    def _decide(self, request: AdmissionRequest) -> None:
        if request.future is None or request.special is not None:
            self._write(request)
            return
        if request.future.cancelled() and not request.force:
            return  # its caller went away before it was decided: nothing was used
        if self._is_stale(request):
            return
        subjects = request.subjects
        if request.hold is None and request.once is None and len(subjects.all) == 1 and self._simply(request):
            return
        if request.once is not None and (before := self._round.repeated.get(request.once.id)) is not None:
            self._repeat(request, request.once, before)
            return
        asked = [subject.asked(request.model, request.route) for subject in subjects.all]
        if request.hold is not None and not self._may_hold(request, request.hold):
            return
        if not request.force and not self._fits(request, asked):
            return
        if request.hold is not None:
            self._hold(request, request.hold, asked)
        else:
            for subject, compiled_limits in zip(subjects.all, asked, strict=True):
                entry = self._entries[subject.id]
                entry.state.use(compiled_limits, request.cost, entry.now_us)
                entry.state.add_totals(request.cost, request.count, entry.now_us)
                entry.changed = True
                if not request.force:
                    self._want(entry, compiled_limits, request.cost)
        self._guard(subjects.guard)
        statuses = self._statuses(subjects, asked)
        if request.once is not None:
            self._happens_once(request, request.once, statuses)
        self._answers.append((request, AdmissionDecision(True, statuses, self._entries[subjects.id].now_us)))

    def _is_stale(self, request: AdmissionRequest) -> bool:
        """Whether the key, or a quota, is known to have changed; then the request has failed."""
        for subject in request.subjects.all:
            known = self._entries[subject.id].subject
            if known is not subject and subject.guard.expected != known.guard.expected:
                fail(request, KeyChanged())
                return True
        return False

    def _simply(self, request: AdmissionRequest) -> bool:
        """Decide the usual request in one pass: it has one subject, on which nothing is held or leased. False: the
        request is another kind, or is not admitted; nothing was done."""
        (subject,) = request.subjects.all
        entry = self._entries[subject.id]
        state = entry.state
        if subject.scoped or state.reserved is not None or state.leases or state.kept:
            return False
        cost, now_us, counters = request.cost, entry.now_us, []
        for one in subject.compiled_limits:
            counter, units = state.counter(one), cost.get(one.resource, 0)
            used = counter.used(now_us)
            if not request.force and used + units > one.most:
                return False
            counters.append((one, counter, used, units))
        statuses = []
        for one, counter, used, units in counters:
            if units and one.resource != CONCURRENCY:
                counter.add(now_us, units)
                used = min(used + units, SATURATED)
            statuses.append(Status(one, used, counter.resets_at_us(now_us), used))
        state.add_totals(cost, request.count, now_us)
        entry.changed = True
        if not request.force:
            self._want(entry, subject.compiled_limits, cost)
        self._answers.append((request, AdmissionDecision(True, tuple(statuses), now_us)))
        return True

    def _hold(self, request: AdmissionRequest, hold: HoldChange, asked: Sequence[tuple[CompiledLimit, ...]]) -> None:
        """Charge the use of a reservation to the subjects that hold it, and hold its new amounts."""
        places = {}
        for subject, compiled_limits in zip(request.subjects.all, asked, strict=True):
            entry = self._entries[subject.id]
            state, now_us = entry.state, entry.now_us
            used = request.cost if subject.id not in hold.not_counted_on else {}
            state.use(compiled_limits, used, now_us)
            if used or hold.ttl_us is None:
                state.add_totals(used, request.count, now_us)
            hold.give_back(subject.id, state, now_us)
            if hold.ttl_us is not None and subject.id not in hold.leaves:
                places[subject.id] = state.hold(subject, compiled_limits, hold.cost, now_us, hold.ttl_us)
                self._want(entry, compiled_limits, hold.cost)
            entry.changed = True
        ends_us = min((place.ends_us for place in places.values()), default=0)
        operation = hold.write(places, ends_us)
        if hold.remembers and isinstance(operation, Create | Put):
            operation.document["memo"] = kept_statuses(request.subjects, self._statuses(request.subjects, asked))
        self._extra.append((operation, request))

    def _want(self, entry: _Entry, compiled_limits: Iterable[CompiledLimit], cost: Cost) -> None:
        """Remember the units that one request asks of each limit: they set the size of the next lease."""
        if self._round.lease_us is not None:
            asked = entry.asked
            if asked is None:
                asked = entry.asked = {}
            for one in compiled_limits:
                asked[one.id] = max(asked.get(one.id, 0), cost.get(one.resource, 0))

    def _write(self, request: AdmissionRequest) -> None:
        special = request.special
        if isinstance(special, Backdate):
            self._backdate(request, special.moment_us)
            return
        for subject in request.subjects.all:
            entry = self._entries[subject.id]
            if special is not None:
                entry.changed = self._correct(request, subject, entry, special) or entry.changed
            elif request.lease == "return":
                entry.returning = True
            elif request.lease == "tell":
                entry.changed = True
        self._answers.append((request, AdmissionDecision(True, (), self._round.now_us)))

    def _correct(self, request: AdmissionRequest, subject: Subject, entry: _Entry, special: Special) -> bool:
        """Correct a state; whether that changed it."""
        state, now_us = entry.state, entry.now_us
        match special:
            case DeadLease():
                # Without such a lease it commits, too: this node's copy of the state may be older than the lease, and
                # only the version check of a commit tells. Else the log would be removed and the lease stay.
                recover(state, subject.compiled_limits, special.lease, special.spent)
                return True
            case AggregatedUse():
                used_at_us = request.used_at_us if request.used_at_us is not None else self._round.now_us
                return add_once(state, special, request.cost, request.count, used_at_us)
            case BeginRefills():
                return begin_refills(state, special.limits, now_us)
            case Refund():
                asked = subject.asked(request.model, request.route)
                return take_back(state, asked, request.cost, special.moment_us, now_us)
        raise AssertionError("the others are admissions")

    def _backdate(self, request: AdmissionRequest, moment_us: int) -> None:
        """Record an earlier use in the windows that still count it, over a limit too."""
        if self._is_stale(request):
            return
        if request.once is not None and (before := self._round.repeated.get(request.once.id)) is not None:
            self._repeat(request, request.once, before)
            return
        subjects = request.subjects.all
        asked = [subject.asked(request.model, request.route) for subject in subjects]
        entries = [self._entries[subject.id] for subject in subjects]
        moment_us = min(moment_us, self._round.now_us)
        there = [(entry.state, own, entry.now_us) for entry, own in zip(entries, asked, strict=True)]
        found, problem = counting(there, request.cost, moment_us)
        if problem is not None:
            fail(request, InvalidInput([Problem("at", problem)]))
            return
        for state, one in found:
            state.counter(one).add_at(moment_us, request.cost[one.resource])
        for entry in entries:
            entry.state.add_totals(request.cost, request.count, moment_us)
            entry.changed = True
        statuses = self._statuses(request.subjects, asked)
        if request.once is not None:
            self._happens_once(request, request.once, statuses)
        self._answers.append((request, AdmissionDecision(True, statuses, self._round.now_us)))

    def _happens_once(self, request: AdmissionRequest, once: IdempotentOperation, statuses: Sequence[Status]) -> None:
        """Answer the same request with this outcome from now on. A denied request may be made, and decided, again."""
        document = once.operation.document
        document["memo"] = kept_statuses(request.subjects, statuses)
        self._round.repeated[once.id] = EarlierAdmission(document["fingerprint"], document["memo"])
        self._extra.append((once.operation, None))

    def _repeat(self, request: AdmissionRequest, once: IdempotentOperation, before: EarlierAdmission) -> None:
        """Answer as the first time. A record of an earlier version has no statuses: answer with the present ones."""
        if before.fingerprint not in once.alike:
            fail(request, Conflict("the idempotency key was used for a different request: take a new one"))
            return
        statuses = statuses_kept(request.subjects, before.memo)
        if statuses is None:
            asked = [subject.asked(request.model, request.route) for subject in request.subjects.all]
            statuses = self._statuses(request.subjects, asked)
        self._answers.append((request, AdmissionDecision(True, statuses, self._round.now_us, repeated=True)))

    def _may_hold(self, request: AdmissionRequest, hold: HoldChange) -> bool:
        """Whether a reservation can be changed; if not, the request has failed."""
        ended_us = hold.ended_us({subject.id: self._entries[subject.id].now_us for subject in request.subjects.all})
        if ended_us is not None:
            fail(request, HoldEnded(ended_us))
        return ended_us is None

    def _fits(self, request: AdmissionRequest, asked: Sequence[tuple[CompiledLimit, ...]]) -> bool:
        """Whether all limits admit a request; if not, it is answered."""
        wanted = []
        for subject, compiled_limits in zip(request.subjects.all, asked, strict=True):
            entry = self._entries[subject.id]
            if request.hold is None:
                want = [(one, request.cost.get(one.resource, 0)) for one in compiled_limits]
            else:
                want = request.hold.wanted(subject.id, entry.state, compiled_limits, request.cost, entry.now_us)
            wanted.append((subject, entry, want))
        if all(entry.state.fits(want, entry.now_us) for _, entry, want in wanted):
            return True
        statuses: list[Status] = []
        for subject, entry, want in wanted:
            if subject.refills and refill_started(entry.state, subject.compiled_limits):
                entry.changed = True  # or a restart would let the refill begin later
            statuses += entry.state.denials(want, entry.now_us)
        self._answers.append((request, AdmissionDecision(False, tuple(statuses), self._round.now_us)))
        return False

    def _statuses(self, subjects: Subjects, asked: Sequence[tuple[CompiledLimit, ...]]) -> tuple[Status, ...]:
        if len(asked) == 1:
            entry = self._entries[subjects.id]
            return entry.state.statuses(asked[0], entry.now_us)
        statuses: list[Status] = []
        for subject, compiled_limits in zip(subjects.all, asked, strict=True):
            entry = self._entries[subject.id]
            statuses += entry.state.statuses(compiled_limits, entry.now_us)
        return tuple(statuses)

    # --- What has to commit -----------------------------------------------------------------------------------

    def _guard(self, guard: Check) -> None:
        if guard.expected:  # without it, a dead process's lease is recovered even if the key has changed
            self._guards[guard.collection, guard.id] = guard

    def _commitment(self) -> DecidedGroup:
        decided = DecidedGroup(self._group, self._answers)
        if self._round.usage_leases:
            self._lease(decided)
        changed = [entry for entry in self._entries.values() if entry.changed]
        if not changed:
            return decided
        if len(changed) > 1:
            changed.sort(key=_id_of)  # in one order for all nodes
        for entry in changed:
            self._guard(entry.subject.guard)
        operations = decided.operations
        operations += self._guards.values()
        if self._round.watcher is not None and (self._watched or self._due):
            self._tell(self._round.watcher, decided, changed)
        for entry in changed:
            state = entry.state
            state.at_us = entry.now_us
            decided.states[len(operations)] = state
            operations.append(usage_operation(entry.subject.id, state))
        if self._extra:
            also = decided.also = {}
            for operation, request in self._extra:
                if request is not None:
                    also[len(operations)] = request
                operations.append(operation)
        return decided

    def _watch(self, watcher: Watcher) -> None:
        for entry in self._entries.values():
            for compiled_limit in entry.subject.compiled_limits:
                thresholds = watcher.thresholds(entry.subject.tenant, compiled_limit.limit)
                if thresholds:
                    before = entry.state.counter(compiled_limit).used(entry.now_us)
                    self._watched.append((entry, compiled_limit, thresholds, before))

    def _tell(self, watcher: Watcher, decided: DecidedGroup, changed: Sequence[_Entry]) -> None:
        """Write the events of crossed thresholds, as many as this commit takes."""
        for entry, compiled_limit, thresholds, before in self._watched:
            state, now_us = entry.state, entry.now_us
            counter = state.counter(compiled_limit)
            used = counter.used(now_us)
            reached = crossed(before, used, compiled_limit.most, thresholds)
            if not reached or not entry.changed:
                continue
            ends_us = counter.ends_us(now_us)
            told = state.told.get(compiled_limit.id)
            new, remembered = untold(told, reached, compiled_limit.limit, compiled_limit.most, ends_us, now_us)
            state.told[compiled_limit.id] = remembered
            state.due += [
                [compiled_limit.id, threshold, used, compiled_limit.most, ends_us, now_us] for threshold in new
            ]
        room = MAX_OPERATIONS - len(decided.operations) - len(changed) - len(self._extra)
        for entry in changed:
            if entry.state.due:
                room -= self._tell_of(watcher, entry, decided, room)

    def _tell_of(self, watcher: Watcher, entry: _Entry, decided: DecidedGroup, room: int) -> int:
        """Put the events of a subject's crossings into the commit, while there is `room`; how many operations."""
        subject, state = entry.subject, entry.state
        by_id = {one.id: one for one in subject.compiled_limits}
        key_id = subject.id if subject.guard.collection == KEYS else None
        count, events, due = 0, [], []
        while state.due:
            limit_id, threshold, used, most, ends_us, at_us = state.due[0]
            if limit_id in by_id:  # else the limit was removed
                limit = by_id[limit_id].limit
                crossing = Crossing(subject.id, subject.tenant, key_id, limit, threshold, used, most, ends_us, at_us)
                puts = watcher.on_crossing(crossing)
                chars = sum(len(put.document["body"]) for put in puts)
                if count + len(puts) > room or decided.event_chars + chars > tuning.MAX_EVENT_CHARS:
                    due.append(subject)
                    break
                self._extra += [(put, None) for put in puts]
                events += [put.id for put in puts]
                decided.event_chars += chars
                count += len(puts)
            del state.due[0]
        decided.events, decided.due = (*decided.events, *events), (*decided.due, *due)
        return count

    def _lease(self, decided: DecidedGroup) -> None:
        """Renew this node's leases on what is written anyway, or return them."""
        lease_us = self._round.lease_us
        asked_for = any(request.lease is not None for request in self._group.requests)
        granted, returned = [], []
        for id, entry in self._entries.items():
            usage_lease = self._round.usage_leases.get(id)
            if usage_lease is None:
                continue
            state, now_us = entry.state, entry.now_us
            state.kept = _NOTHING_KEPT  # it is in the lease again
            if (entry.returning and not usage_lease.open) or lease_us is None:
                usage_lease.give_back()
                returned.append(usage_lease)
            elif entry.returning:  # the limits may have changed: keep what is reserved, lease nothing more
                usage_lease.subject = entry.subject
                usage_lease.grant(state, {}, now_us, lease_us, only_held=True)
                entry.changed = entry.changed or usage_lease.lease in state.leases
            elif entry.changed or asked_for:
                usage_lease.subject = entry.subject
                usage_lease.grant(state, entry.asked or {}, now_us, lease_us)
                entry.changed = entry.changed or usage_lease.lease in state.leases
            else:
                continue
            granted.append((usage_lease, usage_lease.totals_now()))  # new leased limits too, so that they get their cap
        decided.usage_leases, decided.returned = granted, returned


_NOTHING_KEPT: dict[str, int] = {}


def _id_of(entry: _Entry) -> str:
    return entry.subject.id


def usage_operation(id: str, state: UsageState) -> Put | Patch:
    """The operation that makes the usage document equal to the state. `active_at` is left out while it stays the
    same: SQLite writes an index anew whenever a statement names its column."""
    document = state.document()
    if state.version and document["active_at"] == state.stored_active_at:
        del document["active_at"]
        return Patch(NAME, id, document, state.version)
    state.stored_active_at = document["active_at"]  # if this does not commit, the state is read again
    return Put(NAME, id, document, state.version)


__all__ = ["GroupDecision", "Round", "Watcher", "usage_operation"]
