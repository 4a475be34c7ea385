"""Group commit: what waits is written together, in order, and every caller gets an answer."""

from __future__ import annotations

import asyncio
from collections import deque

import pytest

from strongroom.errors import Unavailable
from strongroom.storage.group_commit import GroupCommit, Waiting, up_to
from tests.helpers.waiting import tear_down_the_loop

One = Waiting[int, int]


class Disk:
    """Writes groups of numbers and answers each with its double; `gate` holds a write up."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.keep = 1_000
        self.fails = False
        self.commits: GroupCommit[int, int] = GroupCommit("place", up_to(3), self.write, self.interrupted)

    async def write(self, group: list[One]) -> list[One]:
        self.groups.append([one.request for one in group])
        await self.gate.wait()
        if self.fails:
            raise MemoryError
        for one in group[: self.keep]:
            one.answer(ValueError("odd") if one.request < 0 else 2 * one.request)
        return group[self.keep :]

    def interrupted(self, error: BaseException) -> str:
        return f"ended with {type(error).__name__}"


@pytest.fixture
async def disk() -> Disk:
    return Disk()


async def test_requests_of_one_turn_share_a_group_and_each_has_its_own_answer(disk: Disk) -> None:
    answers = await asyncio.gather(*map(disk.commits.submit, (1, -2, 3)), return_exceptions=True)
    assert (answers[0], type(answers[1]), answers[2]) == (2, ValueError, 6)
    assert disk.groups == [[1, -2, 3]]


async def test_what_arrives_during_a_write_is_the_next_group_in_order_and_bounded(disk: Disk) -> None:
    disk.gate.clear()
    first = disk.commits.submit(1)
    await asyncio.sleep(0)
    later = [disk.commits.submit(number) for number in (2, 3, 4, 5)]
    assert disk.commits.queued == 4
    disk.gate.set()
    assert await asyncio.gather(first, *later) == [2, 4, 6, 8, 10]
    assert disk.groups == [[1], [2, 3, 4], [5]]


async def test_what_a_write_leaves_comes_first_in_the_next_group(disk: Disk) -> None:
    disk.keep = 1
    assert await asyncio.gather(*map(disk.commits.submit, (1, 2, 3, 4))) == [2, 4, 6, 8]
    assert disk.groups == [[1, 2, 3], [2, 3, 4], [3, 4], [4]]


async def test_a_client_that_was_just_answered_joins_the_next_group(disk: Disk) -> None:
    async def client(number: int) -> None:
        for turn in range(3):
            await disk.commits.submit(10 * turn + number)

    await asyncio.gather(*map(client, range(3)))
    assert disk.groups == [[0, 1, 2], [10, 11, 12], [20, 21, 22]]


async def test_a_caller_that_gave_up_does_not_hold_up_the_others(disk: Disk) -> None:
    futures = [disk.commits.submit(number) for number in range(3)]
    futures[1].cancel()
    assert await futures[0] == 0
    assert await futures[2] == 4


@pytest.mark.parametrize("torn_down", [True, False])
async def test_an_interrupted_write_is_of_unknown_outcome_and_what_waited_was_not_written(
    disk: Disk, torn_down: bool
) -> None:
    disk.gate.clear()
    disk.fails = not torn_down
    begun = disk.commits.submit(1)
    await asyncio.sleep(0)
    queued = disk.commits.submit(2)
    if torn_down:
        tear_down_the_loop()
    disk.gate.set()
    answers = await asyncio.gather(begun, queued, return_exceptions=True)
    assert [type(answer) for answer in answers] == [Unavailable, Unavailable]
    assert [answer.details.get("outcome") for answer in answers if isinstance(answer, Unavailable)] == ["unknown", None]
    disk.fails = False
    assert await disk.commits.submit(3) == 6


async def test_writing_that_is_cancelled_before_it_began_answers_all_who_wait(disk: Disk) -> None:
    futures = [disk.commits.submit(number) for number in range(2)]
    tear_down_the_loop()
    answers = await asyncio.gather(*futures, return_exceptions=True)
    assert ["began: try again" in str(answer) for answer in answers] == [True, True]
    assert disk.groups == []


async def test_draining_waits_for_all_that_is_queued(disk: Disk) -> None:
    futures = [disk.commits.submit(number) for number in range(7)]
    await disk.commits.drain()
    assert [future.done() for future in futures] == [True] * 7
    await disk.commits.drain()


async def test_who_holds_the_lock_keeps_writes_away(disk: Disk) -> None:
    async with disk.commits.writing:
        future = disk.commits.submit(1)
        await asyncio.sleep(0.01)
        assert not disk.groups
    assert await future == 2


def test_a_group_is_taken_from_the_front_of_the_queue() -> None:
    queue = deque(range(5))
    assert (up_to(3)(queue), list(queue)) == ([0, 1, 2], [3, 4])  # type: ignore[arg-type, comparison-overlap]
