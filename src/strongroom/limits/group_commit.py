"""Group commit: requests that arrive while a commit is under way are decided together, and share the next one.

One usage document is written for a subject, however many requests it had. An answer waits for its commit; a denial,
which writes nothing, is answered as soon as it is decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from ..clock import Clock
from ..context import utc_from_us
from ..database import Database, IdempotentCall, IdempotentOperation
from ..entities import is_expired
from ..errors import (
    AlreadyExists,
    Conflict,
    NotFound,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from ..storage.port import Check, Committed, Create, Operation, Put, Store
from . import tuning
from .admission import (
    AdmissionRequest,
    DecidedGroup,
    Group,
    KeyChanged,
    Owner,
    answer,
    bundles_of,
    fail,
    groups_of,
    operations_of,
    requests_of,
)
from .decision import GroupDecision, Round, Watcher
from .fairness import Fairness
from .idempotent_admission import EarlierAdmission
from .lease import UsageLease
from .usage_state import Subjects
from .usage_states import UsageStates


class Leases(Owner, Protocol):
    """This node's usage leases, as far as a commit renews them."""

    @property
    def lease_us(self) -> int: ...

    @property
    def lease_id(self) -> str: ...

    def usage_leases_for(self, groups: Sequence[Group]) -> Mapping[str, UsageLease]: ...

    def committed(self, decided: DecidedGroup) -> None: ...

    def not_committed(self, decided: DecidedGroup) -> None: ...


class GroupCommit:
    """Decides the requests that wait, commits them as few batches, and answers them."""

    def __init__(self, database: Database, store: Store, clock: Clock, states: UsageStates) -> None:
        self._database = database
        self._store = store
        self._clock = clock
        self._states = states
        self._embedded = store.capabilities.embedded
        self.fairness = Fairness(self.resume)
        self.leases: Leases | None = None
        self.watcher: Watcher | None = None
        """Who is told of thresholds, in the commit that crosses them; `on_crossed` is called after it."""
        self.on_crossed: Callable[[Sequence[str]], None] | None = None
        self.unreachable = False
        """Whether the last commit found the store out of reach."""
        self.closed = False
        self._waiting: list[AdmissionRequest] = []
        self._task: asyncio.Task[None] | None = None
        self._announced = 0
        """Batches whose requests are about to be submitted."""
        self._usual = 0.0
        """How many requests wait when a round begins, as a moving mean."""
        self._round_s = 0.0
        """How long the last round took."""
        self._commit_s = 0.0
        """How long its commit took."""
        self._separate = 0
        """For so many commits to come, each group has a batch of its own."""

    # --- In -----------------------------------------------------------------------------------------------------

    def submit(self, request: AdmissionRequest) -> None:
        """Let a request wait for its turn; its future, if it has one, fails if that cannot be."""
        if self.closed:
            fail(request, Unavailable("the ledger is closed"))
        elif len(self._waiting) >= tuning.MAX_WAITING:
            fail(request, TooManyRequests("too many requests are waiting for the store: try again in a moment"))
        else:
            self._waiting.append(request)
            if self._task is None:
                self._start()

    def submit_all(self, requests: Sequence[AdmissionRequest]) -> None:
        """Let requests that nobody waits for join the next round, however many wait."""
        self._waiting += requests
        self._wake()

    def resume(self, requests: list[AdmissionRequest]) -> None:
        """Let requests go on that came before those that wait now."""
        self._waiting[:0] = requests
        self._wake()

    @contextmanager
    def announced(self) -> Iterator[None]:
        """Within this, requests of one batch are prepared and submitted: the next round waits a little for them."""
        self._announced += 1
        try:
            yield
        finally:
            self._announced -= 1

    async def settled(self) -> None:
        """Wait until no request waits that could be decided now."""
        while self._task is not None:
            await asyncio.wait([self._task])

    async def stop(self) -> None:
        """Decide nothing any more, as when the process is killed."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def finish(self) -> None:
        """Decide everything that waits, paused subjects included."""
        while self._task is not None or self.fairness.pausing:
            if self._task is None:
                self.fairness.end_pauses()
            if self._task is not None:
                await self._task

    # --- Rounds -------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        if self._task is None and self._waiting:
            self._start()

    def _start(self) -> None:
        # The task starts in the loop's next turn, so that all that arrives in this one shares its commit.
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        try:
            while self._waiting:
                if self._embedded:
                    await self._gather()
                requests, self._waiting = self._waiting, []
                began = time.perf_counter()
                try:
                    await self._round(requests)
                except BaseException as error:  # nobody may wait for ever, whatever went wrong
                    # (requests of a paused subject are not concerned: they were not decided in this round)
                    for request in requests:
                        self._states.drop(subject.id for subject in request.subjects.all)
                        fail(request, Unavailable(f"the request could not be decided: {type(error).__name__}"))
                    raise
                self._round_s = time.perf_counter() - began
                self._states.evict()
        finally:
            self._task = None
            self._wake()  # only if something unforeseen ended the loop: do not leave the others waiting

    async def _gather(self) -> None:
        """Yield to the loop, so that clients that were just answered, and announced batches, can join this commit."""
        enough, began = self._usual * tuning.GATHERED_PART, time.perf_counter()
        if len(self._waiting) < enough:
            most_s = max(tuning.MAX_GATHER_S, (self._usual - len(self._waiting)) * tuning.SAVED_S)
            until = began + min(self._commit_s * tuning.GATHER_PART, most_s)
            while len(self._waiting) < enough and time.perf_counter() < until:  # noqa: ASYNC110 - it is turns that count
                await asyncio.sleep(0)
        if self._announced:
            until = began + min(self._round_s * tuning.ANNOUNCED_PART, tuning.MAX_ANNOUNCED_S)
            while self._announced and time.perf_counter() < until:  # noqa: ASYNC110 - it is turns that count
                await asyncio.sleep(0)
        come = len(self._waiting)
        self._usual += (come - self._usual) / (2 if come > self._usual else 8)

    async def _round(self, requests: list[AdmissionRequest]) -> None:
        """Decide the requests of each group, commit them, answer."""
        groups, later = groups_of(self.fairness.free(requests), self._states.known)
        self._waiting[:0] = later
        requests = [request for group in groups for request in group.requests]
        leases = self.leases
        now_us = self._clock.now_us()
        try:
            repeated = await self._repeated(requests, now_us)
            self._states.forget_unknown_holds(requests, now_us)
            wanted = {id for group in groups for id in group.subjects}
            await self._states.load(wanted, now_us, leases.lease_id if leases is not None else None)
        except StrongroomError as error:
            for request in requests:
                fail(request, error)
            return
        now_us = self._clock.now_us()
        round = Round(
            self._states.known,
            now_us,
            usage_leases=leases.usage_leases_for(groups) if leases is not None else None,
            lease_us=leases.lease_us if leases is not None else None,
            repeated=repeated,
            watcher=self.watcher,
        )
        decided = []
        for group in groups:
            one = GroupDecision(group, round).decided()
            if one.operations:
                decided.append(one)
            else:
                if leases is not None:
                    leases.committed(one)  # there was nothing to be made true
                answer(one.answers)
        await self._commit(decided, now_us)

    async def _repeated(self, requests: list[AdmissionRequest], now_us: int) -> dict[str, EarlierAdmission]:
        """The idempotent requests that were admitted before, within the time that this is remembered."""
        found: dict[str, EarlierAdmission] = {}
        once = [(request, *request.once) for request in requests if request.once is not None]
        if not once:
            return found
        documents = await self._states.stored([(operation.collection, id) for _, id, operation, _ in once])
        now = utc_from_us(now_us)
        for (request, id, operation, alike), stored in zip(once, documents, strict=True):
            name, document = operation.collection, operation.document
            if stored is None:
                request.once = IdempotentOperation(id, Create(name, id, document), alike)
            elif is_expired(IdempotentCall.__collection__, stored, now):
                request.once = IdempotentOperation(id, Put(name, id, document, stored["version"]), alike)
            else:
                found[id] = EarlierAdmission(stored["fingerprint"], stored["memo"])
        return found

    async def _commit(self, decided: list[DecidedGroup], now_us: int) -> None:
        """Make the decisions true, many groups in one batch, and answer.

        A batch fails whole, so if one group's requests cannot be committed, each group is committed alone. Where other
        nodes change the same usage that is likely to go on, so for a while no batches of many are tried; a key that was
        changed (the background changes a used key once a minute) is no reason for that.
        """
        together = self._separate == 0
        self._separate = max(0, self._separate - 1)
        bundles = bundles_of(decided) if together else [[one] for one in decided]
        began = time.perf_counter()
        commits = [self._database.commit_counters(operations_of(bundle), now_us) for bundle in bundles]
        again: list[DecidedGroup] = []
        contended = False
        for bundle, commit in zip(bundles, commits, strict=True):
            try:
                committed = await commit
            except Exception as error:
                self.unreachable = isinstance(error, Unavailable)
                # Unavailable is no key's fault, and may mean that the answer was lost and all of it committed.
                if len(bundle) > 1 and isinstance(error, StrongroomError) and not isinstance(error, Unavailable):
                    again += bundle
                    contended = contended or not isinstance(_failed_operation(error, bundle), Check)
                else:
                    await self._not_committed(error, bundle)
            else:
                self.unreachable = False
                self._committed(bundle, committed)
        if commits:
            self._commit_s = time.perf_counter() - began
        if again:
            self._separate = tuning.SEPARATE_COMMITS if contended else 1
            await self._commit(again, now_us)

    # --- Out ----------------------------------------------------------------------------------------------------

    def _committed(self, bundle: list[DecidedGroup], committed: Committed) -> None:
        """The bundle is durable: answer its callers."""
        position, read_at, leases = 0, time.monotonic(), self.leases
        for one in bundle:
            for index, state in one.states.items():
                state.version = committed.versions[position + index]
                state.read_at = read_at
            position += len(one.operations)
            if leases is not None:
                leases.committed(one)
            answer(one.answers)
            if one.events and self.on_crossed is not None:
                self.on_crossed(one.events)
            for subject in one.due:  # at once: the next use of the key may be far away
                own = Subjects(subject.id, subject.guard, subject.compiled_limits, (), subject.tenant)
                self._waiting.append(AdmissionRequest(own, {}, True, None, None, lease="tell", owner=leases))
        self.fairness.committed(bundle, self._commit_s, shared=self._states.shared)

    async def _not_committed(self, error: Exception, bundle: list[DecidedGroup]) -> None:
        """Another node changed the usage: decide again. The key was changed: its caller decides. Else: it failed."""
        for one in bundle:
            self._states.drop(one.group.subjects)  # they hold use that did not happen
            if self.leases is not None:
                self.leases.not_committed(one)
        if not isinstance(error, Conflict | AlreadyExists | NotFound) or len(bundle) > 1:
            for request in requests_of(bundle):
                fail(request, error)
            return
        (one,) = bundle
        operation = _failed_operation(error, bundle)
        number = error.details.get("operation")
        own = one.also.get(number) if isinstance(number, int) else None
        if isinstance(operation, Check):
            changed = [request for request, _ in one.answers if _is_guarded(request, operation)]
            self._waiting[:0] = [request for request, _ in one.answers if not _is_guarded(request, operation)]
            for request in changed:
                await self._key_changed(request)
        elif own is not None:
            fail(own, error)
            self._waiting[:0] = [request for request, _ in one.answers if request is not own]
        else:
            self._waiting[:0] = self.fairness.lost(one, self._commit_s)  # before what came later

    async def _key_changed(self, request: AdmissionRequest) -> None:
        """Tell the caller, who reads the key again. What has no caller is counted under the changed key."""
        if request.future is not None:
            fail(request, KeyChanged())
            return
        guard, owner = request.subjects.guard, request.owner
        now = None
        try:
            document = await self._store.get(guard.collection, None, guard.id)
            if document is not None and owner is not None:
                now = await owner.described(request.subjects.id)
        except StrongroomError as error:
            fail(request, error)
            return
        if document is not None:  # it counts, whatever was changed; what a removed key had used is gone with it
            guard = Check(guard.collection, guard.id, document["version"])
            own = request.subjects.all[0] if now is None else now
            request.subjects = Subjects(own.id, guard, own.compiled_limits, (), own.tenant)
            if request.lease == "renew":
                request.lease = "return"  # the limits may be others: the next use is leased something by those
            self._waiting.append(request)
        elif owner is not None:
            owner.gone(request)


def _failed_operation(error: StrongroomError, bundle: list[DecidedGroup]) -> Operation | None:
    """The operation that a batch failed for, where the store says so."""
    number = error.details.get("operation")
    return operations_of(bundle)[number] if isinstance(number, int) else None


def _is_guarded(request: AdmissionRequest, guard: Check) -> bool:
    return any(
        (subject.guard.collection, subject.guard.id) == (guard.collection, guard.id) for subject in request.subjects.all
    )


__all__ = ["GroupCommit", "Leases"]
