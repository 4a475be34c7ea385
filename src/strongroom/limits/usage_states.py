"""The usage states in memory: read once, and kept while nothing tells that the store has another one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence

from ..entities import Document
from ..storage.port import Store
from . import tuning
from .admission import AdmissionRequest
from .usage_state import NAME, UsageState


class UsageStates:
    """The usage states of one process, by the subject's id."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._embedded = store.capabilities.embedded
        self.shared = store.capabilities.multi_process
        """Whether another process may change the same documents."""
        self._states: dict[str, UsageState] = {}
        self._forgotten: set[str] | None = None
        """While states are being read: the ids that were forgotten meanwhile, so that an old state is not kept."""

    @property
    def known(self) -> Mapping[str, UsageState]:
        """The states in memory."""
        return self._states

    def ids(self) -> list[str]:
        return list(self._states)

    async def load(self, wanted: Iterable[str], now_us: int, own_lease: str | None) -> None:
        """Have all wanted states in memory, fit to decide at `now_us`. `own_lease`: this node's.

        A state that is forgotten while others are read is read again: the first read may be from before the change, and
        a denial commits nothing that would tell.
        """
        ids = [id for id in wanted if self._is_unread(id, now_us, own_lease)]
        while ids:
            read_at = time.monotonic()
            forgotten: set[str] = set()
            self._forgotten = forgotten
            try:
                documents = await self.stored([(NAME, id) for id in ids])
            finally:
                self._forgotten = None
            for id, document in zip(ids, documents, strict=True):
                if id not in forgotten:
                    self._states[id] = UsageState(document, read_at)
            ids = [id for id in wanted if id not in self._states]

    def _is_unread(self, id: str, now_us: int, own_lease: str | None) -> bool:
        state = self._states.get(id)
        if state is None or (now_us < state.seen_us and state.moment(now_us) < state.seen_us):
            return True  # or the clock went back after a denial, which is in no version
        if not self.shared or (state.reserved is None and not state.leases):
            return False
        # Nobody tells this node what others release. Without a new read it would go on denying.
        others = state.reserved is not None or any(
            leased_limits and lease != own_lease for lease, (_, _, leased_limits) in state.leases.items()
        )
        return others and time.monotonic() - state.read_at > tuning.REREAD_AFTER_S

    async def stored(self, names: Sequence[tuple[str, str]]) -> list[Document | None]:
        """The documents of these collections and ids; None for each that is not there."""
        get = self._store.get
        if self._embedded:  # which reads at once: a task for each would cost more than the read
            return [await get(collection, None, id) for collection, id in names]
        return await asyncio.gather(*(get(collection, None, id) for collection, id in names))

    async def read(self, id: str) -> UsageState:
        """The state as the store has it now, apart from the one in memory."""
        return UsageState(await self._store.get(NAME, None, id))

    def forget_unknown_holds(self, requests: Iterable[AdmissionRequest], now_us: int) -> None:
        """A reservation that is not known here may be another node's, made or extended since its state was read."""
        for request in requests:
            hold = request.hold
            if hold is None:
                continue
            for subject in request.subjects.all:
                state = self._states.get(subject.id)
                if state is not None and not hold.is_known(subject.id, state, state.moment(now_us)):
                    del self._states[subject.id]

    def drop(self, ids: Iterable[str]) -> None:
        """These states hold use that did not happen."""
        for id in ids:
            self._states.pop(id, None)

    def forget(self, id: str) -> None:
        """The key, or the quota, was changed or removed: read its usage again at the next request."""
        self._states.pop(id, None)
        if self._forgotten is not None:
            self._forgotten.add(id)

    def evict(self) -> None:
        """Keep the memory bounded: the states that were read longest ago go."""
        if len(self._states) > tuning.MAX_USAGE_STATES:
            for id in list(self._states)[: tuning.MAX_USAGE_STATES // 10]:
                del self._states[id]


__all__ = ["UsageStates"]
