"""Group commit: requests that arrive while a group is being written are written together as the next group."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, NamedTuple, TypeVar

from ..errors import Unavailable

Request = TypeVar("Request")
Answer = TypeVar("Answer")


class Waiting(NamedTuple, Generic[Request, Answer]):
    """A request, and the future of its caller."""

    request: Request
    future: asyncio.Future[Answer]

    def answer(self, answer: Answer | Exception) -> None:
        """Set the caller's result or error. Does nothing for a caller that was cancelled."""
        if self.future.done():
            return
        if isinstance(answer, Exception):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


class GroupCommit(Generic[Request, Answer]):
    """Writes requests in the order in which they came, one group at a time.

    `next_group` takes the requests of the next group from the queue. `write_group` makes the group durable, answers its
    requests, and returns those that it leaves for the next group. `interrupted` is called if writing ends with an
    exception (the loop is being torn down, or memory ran out) and returns the message of the callers' error.
    `place` names the store in messages. A write holds the lock `writing`; hold it to keep writes away.
    """

    def __init__(
        self,
        place: str,
        next_group: Callable[[deque[Waiting[Request, Answer]]], list[Waiting[Request, Answer]]],
        write_group: Callable[[list[Waiting[Request, Answer]]], Awaitable[list[Waiting[Request, Answer]]]],
        interrupted: Callable[[BaseException], str],
    ) -> None:
        self.writing = asyncio.Lock()
        self._place = place
        self._next_group = next_group
        self._write_group = write_group
        self._interrupted = interrupted
        self._queue: deque[Waiting[Request, Answer]] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def queued(self) -> int:
        """The requests that wait for the next group."""
        return len(self._queue)

    def submit(self, request: Request) -> asyncio.Future[Answer]:
        """Queue a request. The future has its answer once the request is durable, or its error."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Answer] = loop.create_future()
        self._queue.append(Waiting(request, future))
        if self._task is None:
            # The task starts in the loop's next turn, so that all requests of this turn share a group.
            self._task = loop.create_task(self._write_all())
            self._task.add_done_callback(self._answer_if_never_begun)
        return future

    async def drain(self) -> None:
        """Wait until the queue is empty, or writing was interrupted. Raises nothing."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _write_all(self) -> None:
        group: list[Waiting[Request, Answer]] = []
        try:
            while self._queue:
                async with self.writing:
                    group = self._next_group(self._queue)
                    self._queue.extendleft(reversed(await self._write_group(group)))
                group = []
                # Yield once, so that clients that were just answered can join the next group.
                await asyncio.sleep(0)
        except BaseException as error:
            sentence = self._interrupted(error)
            for waiting in group:  # the exception may have come during the commit
                waiting.answer(Unavailable(sentence, outcome="unknown"))
            self._refuse_queued(sentence)
            raise
        finally:
            self._task = None

    def _answer_if_never_begun(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs no line of `_write_all`, not even its handlers."""
        if self._task is task:
            self._task = None
            self._refuse_queued(f"{self._place}: writing ended before it began: try again")

    def _refuse_queued(self, sentence: str) -> None:
        queue, self._queue = self._queue, deque()
        for waiting in queue:
            waiting.answer(Unavailable(sentence))


def up_to(most: int) -> Callable[[deque[Waiting[Request, Answer]]], list[Waiting[Request, Answer]]]:
    """A `next_group` that takes the first `most` requests."""

    def next_group(queue: deque[Waiting[Request, Answer]]) -> list[Waiting[Request, Answer]]:
        return [queue.popleft() for _ in range(min(most, len(queue)))]

    return next_group
