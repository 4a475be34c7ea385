"""A clock that was set to a wrong time affects only the usage recorded then, and setting it back frees none."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import time_machine
from hypothesis import given, settings

from strongroom import Limit, Strongroom
from strongroom.context import us_from_utc
from strongroom.limits.counters import counter_for, stored_counter
from strongroom.limits.reserved_amounts import EXACT_ENDS, GRID, ReservedAmounts, ReservedPlace
from strongroom.limits.usage_state import MAX_AHEAD_US, UsageState, compile_limits, subject_for
from strongroom.limits.windows import Anchored, Calendar, Refill, Rolling, Total, Window
from strongroom.storage.port import Check
from tests.cli.test_cli import Run, run
from tests.helpers.stores import rolling

__all__ = ["run"]  # the fixture

MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)
SECOND = 1_000_000
START = us_from_utc(MOMENT)
WINDOWS: list[Window] = [
    Rolling(seconds=3_600),
    Anchored(seconds=3_600),
    Calendar(unit="hour"),
    Total(),
    Total(refill=Refill(amount=7, seconds=600)),
]


@pytest.fixture(params=["durable", "leased"])
def mode(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.mark.parametrize("ahead", [timedelta(hours=10), timedelta(days=3_650)], ids=["hours", "years"])
async def test_a_call_at_a_wrong_time_affects_only_the_keys_used_then(
    mode: Any, ahead: timedelta, tmp_path: Path
) -> None:
    """Nor, if that time was years ahead, the quota that both share; if it was hours, for those hours."""
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with Strongroom.open("json://:memory:", limits=mode, lease_folder=str(tmp_path)) as room:
            await room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("requests", 8)])
            one, two = [
                await room.keys.create(name="k", tenant="acme", limits=[rolling("requests", 3, 60)]) for _ in range(2)
            ]

            async def admitted(issued: Any) -> int:
                return sum([(await room.keys.verify(issued.text)).valid for _ in range(6)])

            clock.shift(ahead)
            assert (await room.keys.verify(one.text)).valid
            await room.ledger.settled()
            clock.shift(-ahead)
            assert await admitted(two) == 3
            clock.shift(timedelta(seconds=62))
            assert await admitted(two) == 3
            clock.shift(timedelta(seconds=62))
            assert await admitted(two) == 1  # what the quota has left: the call at the wrong time counts as used
            assert (await room.keys.verify(one.text, cost={"requests": 0})).valid  # its account follows the clock now
            clock.shift(timedelta(seconds=3_700) + (ahead if ahead < timedelta(days=1) else timedelta()))
            assert await admitted(one) + await admitted(two) == 6


async def test_a_clock_set_back_by_less_than_a_day_frees_no_usage_until_it_is_corrected(tmp_path: Path) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with Strongroom.open("json://:memory:") as room:
            await room.quotas.put(kind="group", tenant="default", name="g", limits=[rolling("requests", 5, 60)])
            issued = await room.keys.create(name="k", groups=["g"], limits=[rolling("requests", 4, 60)])
            assert await room.keys.mend_clock(issued.key.id) is None
            clock.shift(timedelta(hours=14))
            for _ in range(4):
                assert (await room.keys.verify(issued.text)).valid
            clock.shift(timedelta(hours=-14))
            held = await room.keys.verify(issued.text)
            assert (held.valid, round(held.retry_after_s or 0, -1)) == (False, 14 * 3_600 + 60)
            clock.shift(timedelta(minutes=10))
            assert not (await room.keys.verify(issued.text)).valid
            mended = await room.keys.mend_clock(issued.key.id)
            assert mended is not None
            assert (mended.before, mended.now) == (MOMENT + timedelta(hours=14), MOMENT + timedelta(minutes=10))
            assert not (await room.keys.verify(issued.text)).valid
            clock.shift(timedelta(seconds=61))
            denied = await room.keys.verify(issued.text, cost={"requests": 2})
            assert [limit.subject for limit in denied.limits if limit.exceeded] == ["group:g"]
            assert await room.quotas.mend_clock("group", "default", "g") is not None
            clock.shift(timedelta(seconds=61))
            assert (await room.keys.verify(issued.text, cost={"requests": 4})).valid
            assert await room.quotas.mend_clock("group", "default", "g") is None


async def test_a_clock_that_was_never_set_resets_no_usage(tmp_path: Path) -> None:
    """1970, as on a machine without a battery: what was used stays where it was."""
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with Strongroom.open("json://:memory:") as room:
            issued = await room.keys.create(name="k", limits=[rolling("requests", 2, 60)])
            assert (await room.keys.verify(issued.text)).valid
            clock.move_to(datetime(1970, 1, 2, tzinfo=UTC))
            assert (await room.keys.verify(issued.text)).valid
            clock.move_to(MOMENT + timedelta(seconds=30))
            assert not (await room.keys.verify(issued.text)).valid
            clock.move_to(MOMENT + timedelta(seconds=62))
            assert (await room.keys.verify(issued.text)).valid


async def test_reservations_of_an_account_that_is_set_back_are_held_and_settled(tmp_path: Path) -> None:
    """They are held for as long as they had left; a settlement gives back nothing that another one holds."""
    with time_machine.travel(MOMENT + timedelta(days=40), tick=False) as clock:
        async with Strongroom.open("json://:memory:") as room:
            issued = await room.keys.create(name="k", limits=[Limit(resource="tokens", limit=100, window=Total())])

            async def reserve(tokens: int) -> Any:
                return await room.keys.reserve(issued.text, cost={"tokens": tokens}, ttl_s=60)

            early = await reserve(60)
            clock.move_to(MOMENT)
            assert not (await reserve(41)).valid
            late = await reserve(40)
            assert late.expires_at == MOMENT + timedelta(seconds=60)
            assert (await room.keys.settle(early.reservation_id, {"tokens": 10})).charged == {"tokens": 10}
            assert not (await reserve(1)).valid  # the 60 come back by themselves
            clock.shift(timedelta(seconds=60))
            assert (await reserve(90)).valid


# --- The command --------------------------------------------------------------------------------------------------


def test_the_command_repairs_the_usage_of_a_key_and_of_a_quota(run: Run) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        run("quotas", "set", "--tenant", "acme", "--limit", "requests=5/1h")
        made = run("keys", "create", "--name", "k", "--tenant", "acme", "--limit", "requests=4/1h", "--json").json
        assert run("keys", "verify", stdin=made["key"]).status == 0
        clock.shift(timedelta(hours=-2))
        for command in (["keys", "mend-clock", made["id"]], ["quotas", "mend-clock", "--tenant", "acme"]):
            assert "it is now 2026-05-05 10:00" in run(*command).out
            assert run(*command, "--json").json == {"mended": False}
            assert "nothing to mend" in run(*command).out
        assert run("keys", "mend-clock", "key_unknown").status == 1


# --- Accounts, counters -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", WINDOWS, ids=lambda window: window.kind)
@given(uses=st.lists(st.tuples(st.integers(0, 20_000), st.integers(1, 50)), max_size=8), back_s=st.integers(1, 10**8))
@settings(max_examples=40)
def test_setting_a_counter_back_in_time_frees_no_usage(
    window: Window, uses: list[tuple[int, int]], back_s: int
) -> None:
    counter = counter_for(window)
    then = START + back_s * SECOND
    for later, units in uses:
        then += later * SECOND
        counter.add(then, units)
    used, now = counter.used(then), then - back_s * SECOND
    counter.not_after(now)
    assert counter.used(now) == used
    limit = Limit(resource="tokens", limit=1, window=window)
    assert stored_counter(limit.id, counter.dump()).used(now) == used
    frees_at = counter.frees_at_us(now, 0)
    if isinstance(window, Total):
        assert (frees_at is None) == (bool(used) and window.refill is None)
    else:
        assert frees_at is not None
        assert frees_at <= now + 3_700 * SECOND
        assert counter.used(frees_at) == 0


def test_an_account_follows_the_clock_only_where_it_is_more_than_a_day_ahead() -> None:
    state = UsageState()
    state.at_us = START
    assert state.moment(START - MAX_AHEAD_US) == START
    assert state.moment(START - MAX_AHEAD_US - 1) == state.at_us == START - MAX_AHEAD_US - 1
    state.at_us = START
    assert state.moment(0) == START


# --- What is held -------------------------------------------------------------------------------------------------


@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["hold", "give back", "later", "store"]), st.integers(0, 99), st.integers(1, 300)),
        max_size=120,
    )
)
@settings(max_examples=60)
def test_held_amounts_add_up_and_are_released_no_earlier_than_due(steps: list[tuple[str, int, int]]) -> None:
    """Never less than what the open reservations hold; never more than what those hold whose rounded end is to come."""
    limits = compile_limits([rolling("tokens", 10**6)])
    where = subject_for("key_1", Check("api_keys", "key_1", 1), limits)
    state, now = UsageState(), START
    open_: dict[int, tuple[ReservedPlace, int]] = {}
    for number, (what, which, amount) in enumerate(steps):
        if what == "hold":
            place = state.hold(where, limits, {"tokens": which}, now, amount * SECOND)
            assert place.ends_us == now + amount * SECOND
            assert 0 <= place.until_us - place.ends_us <= amount * SECOND // GRID
            if len(open_) < EXACT_ENDS:
                assert place.until_us == place.ends_us
            open_[number] = place, which
        elif what == "give back" and open_:
            place, _ = open_.pop(list(open_)[which % len(open_)])
            state.give_back(ReservedPlace(*place), now)
            state.give_back(ReservedPlace(*place), now) if not which else None
        elif what == "later":
            now += amount * SECOND // 4
        elif what == "store":
            state = UsageState({**state.document(), "version": 1})
        open_ = {id: one for id, one in open_.items() if now < one[0].until_us}
        assert state.standing(limits[0], now)[1] == sum(units for _, units in open_.values())


def test_an_account_has_a_bounded_number_of_ends() -> None:
    reserved, now = ReservedAmounts(), START
    for number in range(30_000):
        now += 37_000
        reserved.add({"tokens": 1}, ["tokens"], now, (1 + number * number % 86_400) * SECOND)
    assert reserved.ends < EXACT_ENDS + 320
