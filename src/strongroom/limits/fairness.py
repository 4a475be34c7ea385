"""Fairness between nodes that charge the same subjects.

A node that has just committed a subject knows its version, and another node must read it first. Without a pause,
whoever won once would go on winning.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable

from ..errors import Unavailable
from . import tuning
from .admission import AdmissionRequest, DecidedGroup, fail, requests_of


class Fairness:
    """Pauses the requests of a subject that other nodes charge too, so that each node gets its turn. `resume` takes the
    requests back after the pause."""

    def __init__(self, resume: Callable[[list[AdmissionRequest]], None]) -> None:
        self._resume = resume
        self._paused: dict[str, list[AdmissionRequest]] = {}
        """Subjects that wait for their turn, and the requests that arrived meanwhile."""
        self._contended: dict[str, int] = {}
        """Subjects lost to another node, and after how many more commits a pause is to follow."""
        self.retries = 0
        """Requests decided again because another node was faster."""

    @property
    def pausing(self) -> bool:
        return bool(self._paused)

    def free(self, requests: list[AdmissionRequest]) -> list[AdmissionRequest]:
        """The requests whose subjects are not paused; the others wait with those."""
        if not self._paused:
            return requests
        free = []
        for request in requests:
            paused = next((subject.id for subject in request.subjects.all if subject.id in self._paused), None)
            if paused is None:
                free.append(request)
            else:
                self._paused[paused].append(request)
        return free

    def lost(self, one: DecidedGroup, commit_s: float) -> list[AdmissionRequest]:
        """Another node was faster. The requests to decide again: at once the first time, since the winner is done."""
        again = []
        now = time.monotonic()
        for request in requests_of([one]):
            request.attempts += 1
            if request.attempts == 1:
                request.lost_at = now
            if now - request.lost_at <= tuning.RETRY_FOR_S:
                again.append(request)
            else:
                fail(request, Unavailable("this key's usage is being changed by too many nodes at once: try again"))
        self.retries += len(again)
        if len(self._contended) >= tuning.MAX_CONTENDED:
            self._contended.clear()
        for id in one.group.subjects:
            self._contended[id] = tuning.PAUSED_COMMITS
        if again and max(request.attempts for request in again) > 1:
            # No longer than a commit: whoever is faster than the others' pauses gets its turn in one of them.
            self._pause(next(iter(one.group.subjects)), 0, commit_s)
        return again

    def committed(self, decided: Iterable[DecidedGroup], commit_s: float, *, shared: bool) -> None:
        """This node has committed these subjects: let other nodes have a turn where that is due. `shared`: whether
        other nodes can charge them at all."""
        for one in decided:
            lost = [id for id in one.group.subjects if id in self._contended] if self._contended else ()
            for id in lost:
                self._contended[id] -= 1
                if not self._contended[id]:
                    del self._contended[id]
            if lost:
                self._pause(lost[0], 0, 2 * commit_s)
                continue
            for index, state in one.states.items():
                state.turns += 1
                if state.turns >= state.turn_commits:
                    state.turns, state.turn_commits = 0, min(2 * state.turn_commits, tuning.MAX_TURN_COMMITS)
                    if shared:
                        subject = one.operations[index].id  # type: ignore[union-attr]  # the operation is no Append
                        self._pause(subject, 4 * commit_s, 4 * commit_s)

    def _pause(self, id: str, least_s: float, most_s: float) -> None:
        """Decide nothing on this subject for a while."""
        if id not in self._paused:
            self._paused[id] = []
            pause_s = min(random.uniform(least_s, most_s), tuning.MAX_PAUSE_S)  # noqa: S311 - jitter, not a secret
            asyncio.get_running_loop().call_later(pause_s, self._end, id)

    def _end(self, id: str) -> None:
        requests = self._paused.pop(id, None)
        if requests:
            self._resume(requests)

    def end_pauses(self) -> None:
        """Let everything go on at once: the ledger is closing."""
        for id in list(self._paused):
            self._end(id)


__all__ = ["Fairness"]
