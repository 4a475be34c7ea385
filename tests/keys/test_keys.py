"""API keys: verification and its reasons, rotation, idempotency, unknown keys, other nodes, tenants, secrets."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import time_machine
from hypothesis import given
from hypothesis import strategies as st

from strongroom import (
    Anchored,
    ApiKey,
    Calendar,
    Context,
    Limit,
    Strongroom,
    Total,
)
from strongroom.access import ALL_TENANTS
from strongroom.context import new_id, system_context
from strongroom.entities.query import Query
from strongroom.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    InvalidInput,
    NotFound,
    Unavailable,
)
from strongroom.keys import cache as keycache
from strongroom.keys.cached_key import CachedKey
from strongroom.keys.hasher import imported_sha256
from strongroom.keys.model import MAX_METADATA_BYTES, RESTORABLE_FOR_S
from strongroom.keys.token import generate
from strongroom.keys.usage_recorder import Usage
from strongroom.keys.verification import ONE_REQUEST, KeyUse, Verification, usable
from strongroom.limits import backoff
from strongroom.limits import ledger as usage
from strongroom.storage.port import Record
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.stores import new_url, opened, rolling, stored_usage
from tests.helpers.waiting import wait_until

MOMENT = datetime(2026, 5, 5, 12, tzinfo=UTC)
ADMIN = Context(None, "key:admin", {"admin": True}, "request-1")
ACME = Context("acme", "key:acme", {"admin": True, "tenant": "acme"})
SYSTEM = system_context()


async def used(store: FaultyStore, id: str) -> dict[str, int]:
    return (await stored_usage(store.store, id)).totals


async def imported(room: Strongroom, text: str, **fields: Any) -> ApiKey:
    """A key known by the SHA-256 of its text only, as an import makes it."""
    hash = imported_sha256(hashlib.sha256(text.encode()).hexdigest())
    key = ApiKey(id=new_id("key_"), hash=hash, display="?", **{"tenant": "acme", "name": "imported", **fields})
    return await room.database.create(SYSTEM, key)


# --- Codes and their precedence -------------------------------------------------------------------------------


async def test_the_verification_of_a_valid_key_has_every_field(room: Strongroom) -> None:
    issued = await room.keys.create(
        name="worker",
        tenant="acme",
        user_id="u1",
        permissions=["chat:write"],
        metadata={"plan": "pro"},
        limits=[rolling("tokens", 100), Limit(resource="cost", limit=Decimal("0.5"), window=Total())],
    )
    answer = await room.keys.verify(issued.text, cost={"tokens": 30, "cost": Decimal("0.125")})
    assert (answer.valid, answer.code, answer.key_id, answer.tenant) == (True, "VALID", issued.key.id, "acme")
    assert (answer.user_id, answer.permissions, answer.metadata) == ("u1", ["chat:write"], {"plan": "pro"})
    assert answer.retry_after_s is None
    tokens, cost = answer.limits
    assert (tokens.resource, tokens.limit, tokens.used, tokens.remaining) == ("tokens", 100, 30, 70)
    assert tokens.window == {"kind": "rolling", "seconds": 3600}
    assert tokens.resets_at is not None
    assert (cost.limit, cost.used, cost.remaining) == (Decimal("0.5"), Decimal("0.125"), Decimal("0.375"))
    assert cost.resets_at is None


async def test_a_refusal_gives_the_first_reason_and_debits_nothing(room: Strongroom, store: FaultyStore) -> None:
    """DISABLED before EXPIRED before permission before address before limits; each once those before it are met."""
    end = datetime.now(UTC) + timedelta(hours=1)
    issued = await room.keys.create(
        name="k", permissions=["a"], allowed_ips=["10.0.0.0/8"], limits=[rolling("requests", 0)], expires_at=end
    )

    async def code(permission: str = "b", ip: str | None = "11.0.0.1") -> str:
        answer = await room.keys.verify(issued.text, permission=permission, ip=ip)
        assert not answer.valid
        assert answer.message
        return answer.code

    await room.keys.disable(issued.key.id)
    with time_machine.travel(end + timedelta(seconds=1)):
        assert await code() == "DISABLED"
        await room.keys.enable(issued.key.id)
        assert await code() == "EXPIRED"
    assert await code() == "INSUFFICIENT_PERMISSIONS"
    assert await code("a") == "FORBIDDEN"
    assert await code("a", None) == "FORBIDDEN"  # without an address it cannot be an allowed one
    assert await code("a", "10.255.255.255") == "RATE_LIMITED"
    assert (await room.keys.verify("nonsense")).code == "NOT_FOUND"
    assert await used(store, issued.key.id) == {}


@pytest.mark.parametrize(
    ("resource", "code"), [("requests", "RATE_LIMITED"), ("tokens", "USAGE_EXCEEDED"), ("cost", "USAGE_EXCEEDED")]
)
async def test_a_denial_names_the_limit_and_its_reset(room: Strongroom, resource: str, code: str) -> None:
    other = Limit(resource="other", limit=10**6, window=Total())
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(
            name="k", limits=[other, Limit(resource=resource, limit=10, window=Anchored(seconds=60))]
        )
        await room.keys.verify(issued.text, cost={resource: 8, "other": 1})
        clock.shift(15)
        denied = await room.keys.verify(issued.text, cost={resource: 3, "other": 1})
        assert (denied.valid, denied.code, denied.retry_after_s) == (False, code, 45.0)
        assert [limit.exceeded for limit in denied.limits] == [False, True]
        assert [limit.used for limit in denied.limits] == [1, 8]
        assert denied.message
        assert "8 of 10 used" in denied.message
        assert "60 s from the first use (anchored window)" in denied.message
        assert "2026-05-05T12:01:00+00:00" in denied.message
        never = await room.keys.verify(issued.text, cost={resource: 11})
        assert never.retry_after_s is None
        clock.shift(timedelta(seconds=45, microseconds=-1))
        assert not (await room.keys.verify(issued.text, cost={resource: 3})).valid
        clock.shift(timedelta(microseconds=1))
        assert (await room.keys.verify(issued.text, cost={resource: 3})).valid


@given(cost=st.integers(1, 12), used=st.integers(0, 12))
async def test_a_retry_is_admitted_after_retry_after_and_not_just_before(cost: int, used: int) -> None:
    limits = [
        rolling("tokens", 10, 60),
        Limit(resource="tokens", limit=11, window=Anchored(seconds=90)),
        Limit(resource="tokens", limit=12, window=Calendar(unit="minute")),
    ]
    with time_machine.travel(MOMENT, tick=False) as clock:
        async with Strongroom.open("json://:memory:") as room:
            issued = await room.keys.create(name="k", limits=limits)
            await room.keys.record(key=issued.text, cost={"tokens": used})
            clock.shift(7)
            answer = await room.keys.verify(issued.text, cost={"tokens": cost})
            assert answer.valid == (used + cost <= 10)
            if cost > 10:
                assert answer.retry_after_s is None
            elif not answer.valid:
                assert answer.retry_after_s is not None
                clock.shift(timedelta(seconds=answer.retry_after_s, microseconds=-1))
                assert not (await room.keys.verify(issued.text, cost={"tokens": cost})).valid
                clock.shift(timedelta(microseconds=1))
                assert (await room.keys.verify(issued.text, cost={"tokens": cost})).valid


async def test_a_key_expires_within_its_millisecond(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(name="k", expires_at=MOMENT + timedelta(seconds=5))
        clock.shift(timedelta(seconds=5, microseconds=-1))
        assert (await room.keys.verify(issued.text)).code == "VALID"
        assert await room.keys.authenticate(issued.text)
        clock.shift(timedelta(microseconds=1))
        assert (await room.keys.verify(issued.text)).code == "EXPIRED"
        assert await room.keys.authenticate(issued.text) is None
        assert (await room.keys.stats(issued.key.id)).expired
        await room.keys.update(issued.key.id, expires_at=None)
        assert (await room.keys.verify(issued.text)).code == "VALID"


@pytest.mark.parametrize(
    ("held", "asked", "permitted"),
    [
        (["chat:write"], "chat:write", True),
        (["chat:write"], "chat:writer", False),
        (["chat:write"], "chat", False),
        (["chat:*"], "chat:write", True),
        (["chat:*"], "chat:", True),
        (["chat:*"], "chats:write", False),
        (["chat:*"], "chat", False),
        (["*"], "anything", True),
        (["a", "b"], "b", True),
        (["a*b"], "axb", False),
        ([], "a", False),
        ([], None, True),
    ],
)
async def test_permissions_match_with_wildcards(held: list[str], asked: str | None, permitted: bool) -> None:
    key = CachedKey(ApiKey(id="k", tenant="t", name="n", hash="h", display="d", permissions=held))
    assert (usable(key, KeyUse(ONE_REQUEST, permission=asked), 0) is key) is permitted


@pytest.mark.parametrize(
    ("allowed", "address", "admitted"),
    [
        (["10.0.0.0/8"], "10.1.2.3", True),
        (["10.0.0.0/8"], "11.0.0.0", False),
        (["10.0.0.0/8"], "::ffff:10.1.2.3", True),  # how a dual-stack socket reports an IPv4 peer
        (["10.0.0.0/8"], "::ffff:11.1.2.3", False),
        (["10.0.0.0/8"], "::10.1.2.3", False),  # that is another address
        (["10.1.2.3/8"], "10.9.9.9", True),  # host bits are ignored
        (["10.1.2.3"], "10.1.2.3", True),
        (["10.1.2.3"], "10.1.2.4", False),
        (["2001:db8::/32"], "2001:db8::1", True),
        (["2001:db8::/32"], "2001:db9::1", False),
        (["2001:db8::/32"], "10.0.0.1", False),
        (["0.0.0.0/0"], "2001:db8::1", False),
        (["::/0"], "10.0.0.1", False),
        (["::/0"], "2001:db8::1", True),
        (["::ffff:10.0.0.0/104"], "10.1.2.3", True),
        (["::ffff:10.0.0.0/104"], "::ffff:10.1.2.3", True),
        (["::ffff:10.0.0.0/104"], "11.1.2.3", False),
        (["::ffff:10.1.2.3/104"], "10.9.9.9", True),  # host bits are ignored here as well
        (["::ffff:10.1.2.3"], "10.1.2.3", True),
        (["::ffff:10.1.2.3"], "10.1.2.4", False),
        (["::ffff:0:0/96"], "203.0.113.9", True),  # every IPv4 address
        (["::ffff:0:0/96"], "2001:db8::1", False),
        (["0.0.0.0/0"], "203.0.113.9", True),
        (["0.0.0.0/0"], "::ffff:203.0.113.9", True),
        (["::/0"], "::ffff:10.0.0.1", False),  # which is the IPv4 address 10.0.0.1
        (["10.0.0.0/32"], "10.0.0.0", True),
        (["10.0.0.0/31"], "10.0.0.1", True),
        (["10.0.0.0/31"], "10.0.0.2", False),
        (["fe80::/10"], "fe80::1%eth0", True),
        (["2001:db8::1/128"], "2001:db8::1", True),
        (["192.168.0.0/16", "2001:db8::1"], "2001:0db8:0:0:0:0:0:1", True),
        ([], "10.0.0.1", True),
        ([], None, True),
        (["10.0.0.0/8"], None, False),
    ],
)
def test_address_ranges(allowed: list[str], address: str | None, admitted: bool) -> None:
    key = CachedKey(ApiKey(id="k", tenant="t", name="n", hash="h", display="d", allowed_ips=allowed))
    assert (usable(key, KeyUse(ONE_REQUEST, address=address), 0) is key) is admitted


async def test_a_caller_that_mutates_an_answer_changes_no_later_answer(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", permissions=["a"])
    answer = await room.keys.verify(issued.text)
    answer.permissions.append("admin")
    assert (await room.keys.verify(issued.text, permission="admin")).code == "INSUFFICIENT_PERMISSIONS"


# --- What callers say -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cost",
    [
        {"requests": -1},
        {"requests": 1.5},
        {"requests": "1"},
        {"requests": True},
        {"requests": None},
        {"Requests": 1},
        {"requests\n": 1},
        {"": 1},
        {"x" * 65: 1},
        {"cost": Decimal("0.0000000001")},
        {"tokens": 10**15 + 1},
        {f"r{n}": 1 for n in range(33)},
    ],
)
async def test_an_invalid_cost_is_refused_and_debits_nothing(cost: dict[str, Any]) -> None:
    async with Strongroom.open("json://:memory:") as room:
        issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
        for call in (
            room.keys.verify(issued.text, cost=cost),
            room.keys.verify("unknown", cost=cost),
            room.keys.record(key=issued.text, cost=cost),
        ):
            with pytest.raises(InvalidInput) as caught:
                await call
            assert all(problem.path.startswith("cost") for problem in caught.value.problems)
        assert (await room.keys.stats(issued.key.id)).totals == {}


async def test_every_invalid_amount_is_reported_at_once(room: Strongroom) -> None:
    with pytest.raises(InvalidInput) as caught:
        await room.keys.verify("k", cost={"requests": -1, "Tokens": 1, "fine": 1, "cost": "x"})  # type: ignore[dict-item]
    assert [problem.path for problem in caught.value.problems] == ["cost.requests", "cost.Tokens", "cost.cost"]


@pytest.mark.parametrize("ip", ["", "10.0.0", "10.0.0.1/8", "x" * 1000, "10.0.0.1\n"])
async def test_an_invalid_address_is_refused(room: Strongroom, ip: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await room.keys.verify("k", ip=ip)
    assert caught.value.problems[0].path == "ip"
    assert len(str(caught.value)) < 200


async def test_the_default_cost_is_one_request_and_an_empty_cost_is_zero(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
    await room.keys.verify(issued.text)
    await room.keys.verify(issued.text, cost={})
    assert await used(store, issued.key.id) == {"requests": 1}


WRONG_FIELDS: list[tuple[str, Any]] = [
    ("name", ""),
    ("name", "x" * 201),
    ("name", "a\x00"),
    ("tenant", ""),
    ("tenant", "x" * 129),
    ("user_id", "\ud800"),
    ("permissions", ["a b"]),
    ("permissions", ["a\n"]),
    ("permissions", ["a"] * 101),
    ("expires_at", datetime(2027, 1, 1)),  # noqa: DTZ001 - without a zone: that is what is wrong with it
    ("expires_at", "tomorrow"),
    ("allowed_ips", ["10.0.0.0/33"]),
    ("allowed_ips", ["example.com"]),
    ("allowed_ips", ["10.0.0.1/0.0.0.0"]),
    ("allowed_ips", ["10.0.0.0/255.0.0.0"]),
    ("allowed_ips", ["10.0.0.0/"]),
    ("allowed_ips", ["10.0.0.0/8/8"]),
    ("allowed_ips", ["10.0.0.0/-8"]),
    ("allowed_ips", ["10.0.0.0/\u0668"]),
    ("allowed_ips", [" 10.0.0.0/8"]),
    ("allowed_ips", ["::ffff:10.0.0.0/129"]),
    ("allowed_ips", [""]),
    ("environment", "prod"),
    ("owner", ""),
    ("owner", "x" * 201),
    ("description", "a\x00"),
    ("description", "x" * 2001),
    ("groups", ["x"] * 17),
    ("groups", ["x" * 201]),
    ("allowed_models", ["a*b"]),
    ("allowed_models", ["**"]),
    ("allowed_models", [""]),
    ("allowed_routes", ["a\nb"]),
    ("allowed_routes", [f"r{n}" for n in range(101)]),
    ("metadata", {"big": "x" * MAX_METADATA_BYTES}),
    ("metadata", {"number": 2**70}),
    ("metadata", {"object": object()}),
    ("limits", [rolling("tokens", 5), rolling("tokens", 6)]),
    ("limits", [rolling("tokens", 5, seconds) for seconds in range(1, 34)]),
    ("limits", [{"resource": "tokens", "limit": -1, "window": {"kind": "total"}}]),
    ("prefix", "Upper"),
    ("prefix", "a__b"),
    ("prefix", "x" * 25),
    ("unknown", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG_FIELDS, ids=lambda value: str(value)[:20].encode("ascii", "replace"))
async def test_an_invalid_field_of_a_key_is_named(name: str, value: Any) -> None:
    async with Strongroom.open("json://:memory:") as room:
        with pytest.raises(InvalidInput) as caught:
            await room.keys.create(**{"name": "k", name: value})
        assert any(name in f"{problem.path} {problem.message}" for problem in caught.value.problems)
        assert (await room.keys.list()).items == []


async def test_every_invalid_field_is_reported_at_once() -> None:
    async with Strongroom.open("json://:memory:") as room:
        wrong: dict[str, Any] = {
            "name": "",
            "permissions": ["a b"],
            "allowed_ips": ["x"],
            "limits": [{"resource": "X"}],
            "other": 1,
        }
        with pytest.raises(InvalidInput) as caught:
            await room.keys.create(**wrong)
        found = {problem.path.split(".")[0] for problem in caught.value.problems}
        assert found == {"name", "permissions", "allowed_ips", "limits", "other"}


# --- Rotation -------------------------------------------------------------------------------------------------


async def test_both_secrets_share_limits_during_the_overlap_which_ends_on_time(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        first = await room.keys.create(name="k", prefix="acme_live", limits=[rolling("tokens", 100, 18_000)])
        await room.keys.verify(first.text, cost={"tokens": 60})
        second = await room.keys.rotate(first.key.id, overlap_s=60)
        assert second.key.id == first.key.id
        assert second.text != first.text
        assert second.text.startswith("acme_live_SR1")
        assert (await room.keys.verify(first.text, cost={"tokens": 30})).limits[0].used == 90
        assert (await room.keys.verify(second.text, cost={"tokens": 30})).code == "USAGE_EXCEEDED"
        assert (await room.keys.verify(second.text, cost={"tokens": 10})).limits[0].used == 100
        clock.shift(timedelta(seconds=60, microseconds=-1))
        assert (await room.keys.verify(first.text, cost={"tokens": 0})).valid
        clock.shift(timedelta(microseconds=1))
        assert (await room.keys.verify(first.text, cost={"tokens": 0})).code == "NOT_FOUND"
        assert (await room.keys.verify(second.text, cost={"tokens": 0})).valid


async def test_a_rotation_without_overlap_ends_the_old_secret_at_once(room: Strongroom) -> None:
    first = await room.keys.create(name="k")
    assert (await room.keys.verify(first.text)).valid
    second = await room.keys.rotate(first.key.id)
    assert (second.key.previous_hash, second.key.previous_until) == (None, None)
    assert (await room.keys.verify(first.text)).code == "NOT_FOUND"
    assert (await room.keys.verify(second.text)).valid
    third = await room.keys.rotate(first.key.id, overlap_s=60)
    fourth = await room.keys.rotate(first.key.id, overlap_s=60)
    codes = [(await room.keys.verify(i.text)).code for i in (first, second, third, fourth)]
    assert codes == ["NOT_FOUND", "NOT_FOUND", "VALID", "VALID"]


async def test_an_overlap_is_found_by_a_node_that_starts_in_it(tmp_path: Path) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        url = new_url("sqlite", tmp_path)
        async with Strongroom.open(url) as room:
            first = await room.keys.create(name="k")
            await room.keys.rotate(first.key.id, overlap_s=60)
        async with Strongroom.open(url) as room:
            assert (await room.keys.verify(first.text)).valid
        clock.shift(60)
        async with Strongroom.open(url) as room:
            assert (await room.keys.verify(first.text)).code == "NOT_FOUND"


async def test_concurrent_rotations_leave_one_current_secret(room: Strongroom) -> None:
    first = await room.keys.create(name="k")
    rotated = await asyncio.gather(*(room.keys.rotate(first.key.id) for _ in range(5)))
    codes = [(await room.keys.verify(issued.text)).code for issued in rotated]
    assert sorted(codes) == ["NOT_FOUND"] * 4 + ["VALID"]


@pytest.mark.parametrize("overlap", [-1, 30 * 86_400 + 1, 1.5, True, "60", None])
async def test_an_impossible_overlap_is_refused(room: Strongroom, overlap: Any) -> None:
    issued = await room.keys.create(name="k")
    with pytest.raises(InvalidInput, match="overlap_s"):
        await room.keys.rotate(issued.key.id, overlap_s=overlap)


# --- Idempotency ----------------------------------------------------------------------------------------------


async def test_a_retried_create_or_rotate_returns_the_same_secret(room: Strongroom) -> None:
    first = await room.keys.create(name="k", context=ADMIN, idempotency_key="i")
    made = await asyncio.gather(*(room.keys.create(name="k", context=ADMIN, idempotency_key="i") for _ in range(5)))
    assert {(issued.key.id, issued.text) for issued in made} == {(first.key.id, first.text)}
    rotated = await asyncio.gather(
        *(room.keys.rotate(first.key.id, context=ADMIN, idempotency_key="r") for _ in range(5))
    )
    assert len({issued.text for issued in rotated}) == 1
    again = await room.keys.rotate(first.key.id, context=ADMIN, idempotency_key="r")
    assert again.text == rotated[0].text != first.text
    assert (await room.keys.verify(again.text)).valid
    assert len((await room.keys.list()).items) == 1


async def test_an_idempotency_key_belongs_to_one_caller_and_one_request(room: Strongroom) -> None:
    first = await room.keys.create(name="k", tenant="acme", context=ADMIN, idempotency_key="i")
    with pytest.raises(Conflict, match="different request"):
        await room.keys.create(name="other", tenant="acme", context=ADMIN, idempotency_key="i")
    with pytest.raises(Conflict, match="different request"):
        await room.keys.rotate(first.key.id, context=ADMIN, idempotency_key="i")
    other = await room.keys.create(name="k", tenant="acme", context=ACME, idempotency_key="i")
    assert other.text != first.text


async def test_a_retry_returns_the_same_secret_after_a_pepper_rotation(room: Strongroom) -> None:
    first = await room.keys.create(name="k", context=ADMIN, idempotency_key="i")
    await room.rotate_pepper()
    assert (await room.keys.create(name="k", context=ADMIN, idempotency_key="i")).text == first.text


async def test_a_retry_after_a_lost_answer_creates_no_second_key(room: Strongroom, store: FaultyStore) -> None:
    number = len(store.batches)
    store.fault = lambda n, batch: Fault("after", Unavailable("lost")) if n == number else None
    with pytest.raises(Unavailable):
        await room.keys.create(name="k", idempotency_key="i")
    issued = await room.keys.create(name="k", idempotency_key="i")
    assert (await room.keys.verify(issued.text)).valid
    assert len((await room.keys.list()).items) == 1


async def test_usage_is_recorded_once_for_one_idempotency_key(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("tokens", 100)])
    both_ways: list[dict[str, Any]] = [{"key": issued.text}, {"key_id": issued.key.id}]
    answers = await asyncio.gather(
        *(room.keys.record(**by, cost={"tokens": 70}, idempotency_key="i") for by in both_ways * 5)
    )
    assert {answer.limits[0].used for answer in answers} == {70}
    assert await used(store, issued.key.id) == {"tokens": 70}
    await room.keys.record(key=issued.text, cost={"tokens": 70}, idempotency_key="j")
    other = await room.keys.create(name="another", limits=[rolling("tokens", 100)])
    others: list[dict[str, Any]] = [
        {"key": other.text}, {"key": issued.text, "model": "m"}, {"key": issued.text, "route": "/r"},
    ]  # fmt: skip
    for another in others:
        with pytest.raises(Conflict, match="different request"):
            await room.keys.record(**another, cost={"tokens": 70}, idempotency_key="i")
    assert await used(store, issued.key.id) == {"tokens": 140}
    assert await used(store, other.key.id) == {}


async def test_usage_is_recorded_on_disabled_and_expired_keys_but_not_on_unknown_keys(
    room: Strongroom, store: FaultyStore
) -> None:
    issued = await room.keys.create(name="k", tenant="acme")
    await room.keys.update(issued.key.id, expires_at=datetime.now(UTC) - timedelta(days=1))
    await room.keys.disable(issued.key.id)
    await room.keys.record(key=issued.text, cost={"tokens": 5})
    await room.keys.record(key_id=issued.key.id, cost={"tokens": 5}, context=ACME)
    assert await used(store, issued.key.id) == {"tokens": 10}
    calls: list[dict[str, Any]] = [
        {"key": generate()},
        {"key_id": "key_none"},
        {"key_id": issued.key.id, "context": Context("beta", "key:b", {"admin": True, "tenant": "beta"})},
    ]
    for call in calls:
        with pytest.raises(NotFound):
            await room.keys.record(**call, cost={"tokens": 5})
    wrong: list[dict[str, Any]] = [{}, {"key": issued.text, "key_id": issued.key.id}, {"key_id": "\ud800"}]
    for call in wrong:
        with pytest.raises(InvalidInput):
            await room.keys.record(**call, cost={"tokens": 5})


# --- Imported hashes and peppers ------------------------------------------------------------------------------


async def test_an_imported_sha256_is_upgraded_at_its_first_use(room: Strongroom, store: FaultyStore) -> None:
    key = await imported(room, "sk-imported-1234567890", limits=[rolling("tokens", 100)])
    assert (await room.keys.verify("sk-imported-1234567890", cost={"tokens": 5})).valid
    stored = await room.keys.get(key.id)
    assert stored.hash == room.keys.hasher.hash("sk-imported-1234567890")
    assert stored.sealed
    assert room.keys.hasher.unseal(stored.sealed) == hashlib.sha256(b"sk-imported-1234567890").digest()
    assert stored.display == "sk…90"
    commits = len(store.batches)
    answer = await room.keys.verify("sk-imported-1234567890", cost={"tokens": 5})
    assert answer.limits[0].used == 10
    assert len(store.batches) == commits + 1  # its usage and nothing else


async def test_an_imported_key_works_although_its_hash_cannot_be_renewed(room: Strongroom, store: FaultyStore) -> None:
    await imported(room, "sk-imported")
    store.fault = lambda number, batch: Fault("before", Unavailable("read-only"))
    assert (await room.keys.verify("sk-imported")).valid
    store.fault = lambda number, batch: None


async def test_the_hash_upgrade_of_a_key_of_all_tenants_is_the_platforms(room: Strongroom, store: FaultyStore) -> None:
    await imported(room, "sk-imported", tenant=ALL_TENANTS)
    assert (await room.keys.verify("sk-imported")).valid
    assert [r.tenant for r in (await store.changes(None)).records if r.collection == "api_keys"] == [None, None]


async def test_hashes_move_to_a_new_pepper_at_their_next_use(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("tokens", 100)])
    idle = await room.keys.create(name="idle")
    await room.keys.verify(issued.text, cost={"tokens": 60})
    await room.rotate_pepper()
    room.keys.changed(issued.key.id)
    assert (await room.keys.verify(issued.text, cost={"tokens": 60})).code == "USAGE_EXCEEDED"
    assert (await room.keys.get(issued.key.id)).hash.startswith("000002:")
    assert (await room.keys.get(idle.key.id)).hash.startswith("000001:")
    made = await room.keys.create(name="new")
    assert made.key.hash.startswith("000002:")
    for key in (issued, idle, made):
        room.keys.changed(key.key.id)
        assert (await room.keys.verify(key.text, cost={})).valid


async def test_keys_work_after_very_many_pepper_rotations(room: Strongroom) -> None:
    first = await room.keys.create(name="k")
    old = await room.keys.create(name="old")
    rotated = await room.keys.rotate(old.key.id, overlap_s=3600)
    for _ in range(35):
        await room.rotate_pepper()
    for issued in (first, rotated, old):
        room.keys.changed(issued.key.id)
        assert (await room.keys.verify(issued.text)).valid
    assert (await room.keys.verify(generate())).code == "NOT_FOUND"


async def test_configured_peppers_rotate_by_configuration(tmp_path: Path) -> None:
    url, one, two = new_url("sqlite", tmp_path), "1" * 32, "2" * 32
    async with Strongroom.open(url, peppers=[one]) as room:
        issued = await room.keys.create(name="k")
    async with Strongroom.open(url, peppers=[two, one]) as room:
        assert (await room.keys.verify(issued.text)).valid
        assert (await room.keys.get(issued.key.id)).hash != issued.key.hash
    async with Strongroom.open(url, peppers=[two]) as room:
        assert (await room.keys.verify(issued.text)).valid
    async with Strongroom.open(url, peppers=[one]) as room:
        assert (await room.keys.verify(issued.text)).code == "NOT_FOUND"


# --- Unknown keys, and how much is read ------------------------------------------------------------------------


async def test_an_unknown_key_writes_nothing_and_is_not_read_again(room: Strongroom, store: FaultyStore) -> None:
    text = generate()
    batches, documents = len(store.batches), (await store.store.check()).details.get("documents")
    await room.keys.verify(text)
    reads = len(store.reads)
    for _ in range(100):
        assert (await room.keys.verify(text)).code == "NOT_FOUND"
    assert len(store.reads) == reads
    assert len(store.batches) == batches
    assert (await store.store.check()).details.get("documents") == documents


async def test_a_key_with_a_wrong_checksum_is_refused_without_a_read(room: Strongroom, store: FaultyStore) -> None:
    text = (await room.keys.create(name="k")).text
    reads = len(store.reads)
    wrong = [
        text[:-1],
        text[:20],
        text[:-1] + ("0" if text[-1] != "0" else "1"),
        text + "x",
        text[:30] + "-" + text[31:],
    ]
    for mistyped in [*wrong, text + "\n", "", "x" * 600, "\x00", "\ud800"]:
        assert (await room.keys.verify(mistyped)).code == "NOT_FOUND"
    assert len(store.reads) == reads


async def test_the_memory_for_unknown_keys_is_bounded(
    room: Strongroom, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keycache, "MAX_UNKNOWN", 50)
    for _ in range(300):
        await room.keys.verify(generate())
        assert len(room.keys.cache._unknown) <= 50


async def test_the_memory_for_cached_keys_is_bounded(room: Strongroom, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keycache, "MAX_CACHED_KEYS", 10)
    issued = [await room.keys.create(name="k") for _ in range(25)]
    for _ in range(2):
        for one in issued:
            assert (await room.keys.verify(one.text)).valid
            assert len(room.keys.cache._known) <= 10
            assert len(room.keys.cache._by_id) <= 10
    await room.keys.disable(issued[0].key.id)
    assert (await room.keys.verify(issued[0].text)).code == "DISABLED"


async def test_a_cold_key_costs_one_point_read_and_a_warm_one_none(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as room:
        issued = await room.keys.create(name="k", limits=[rolling("requests", 100)])
    async with opened(url) as (room, store):
        store.reads.clear()
        assert (await room.keys.verify(issued.text)).valid
        assert store.reads == [("find", "api_keys"), ("find", "quotas"), ("get", "key_usage")]
        for _ in range(10):
            assert (await room.keys.verify(issued.text)).valid
        assert len(store.reads) == 3


async def test_a_key_created_during_its_lookup_is_found_at_once(room: Strongroom, store: FaultyStore) -> None:
    async def overtake(method: str, collection: str) -> None:
        if store.reads[-1] == ("find", "api_keys"):
            store.after_read = None
            await imported(room, "sk-imported")

    store.after_read = overtake
    await room.keys.verify("sk-imported")
    assert (await room.keys.verify("sk-imported")).valid


async def test_a_key_changed_during_its_read_is_not_cached(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k")
    seen: list[Record] = []
    room.feed.on_record(seen.append)

    async def overtake(method: str, collection: str) -> None:
        store.after_read = None
        await room.keys.disable(issued.key.id)
        await wait_until(lambda: "update" in [record.action for record in seen])  # nothing more will be heard of it

    store.after_read = overtake
    await room.keys.verify(issued.text)
    assert (await room.keys.verify(issued.text)).code == "DISABLED"


async def test_a_store_that_cannot_be_read_is_an_error_and_not_an_unknown_key(
    room: Strongroom, store: FaultyStore
) -> None:
    issued = await room.keys.create(name="k")

    async def fail(method: str, collection: str) -> None:
        raise Unavailable("gone")

    store.before_read = fail
    with pytest.raises(Unavailable):
        await room.keys.verify(issued.text)
    store.before_read = None
    assert (await room.keys.verify(issued.text)).valid


# --- Several nodes --------------------------------------------------------------------------------------------


async def test_a_key_disabled_elsewhere_is_refused_at_once_if_it_has_limits(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here, Strongroom.open(url) as there:
        for _ in range(5):
            issued = await here.keys.create(name="k", limits=[rolling("requests", 100)])
            assert (await there.keys.verify(issued.text)).valid
            await here.keys.disable(issued.key.id)
            assert (await there.keys.verify(issued.text)).code == "DISABLED"
            await here.keys.enable(issued.key.id)
            rotated = await here.keys.rotate(issued.key.id)
            await wait_until(partial(_is_valid, there, rotated.text))
            assert (await there.keys.verify(issued.text)).code == "NOT_FOUND"
            await here.keys.delete(issued.key.id)
            assert (await there.keys.verify(rotated.text)).code == "NOT_FOUND"


async def _is_valid(room: Strongroom, text: str) -> bool:
    return (await room.keys.verify(text)).valid


async def test_a_key_without_limits_disabled_elsewhere_is_refused_within_a_second(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here, Strongroom.open(url) as there:
        issued = await here.keys.create(name="k")
        assert await _is_valid(there, issued.text)
        assert await there.keys.authenticate(issued.text)
        await here.keys.disable(issued.key.id)

        async def refused() -> bool:
            return not await _is_valid(there, issued.text)

        await wait_until(refused)
        assert await there.keys.authenticate(issued.text) is None


async def test_a_lowered_limit_holds_elsewhere_at_once(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here, Strongroom.open(url) as there:
        issued = await here.keys.create(name="k", limits=[rolling("tokens", 100)])
        assert (await there.keys.verify(issued.text, cost={"tokens": 50})).valid
        await here.keys.update(issued.key.id, limits=[rolling("tokens", 60)])
        assert (await there.keys.verify(issued.text, cost={"tokens": 20})).code == "USAGE_EXCEEDED"


async def test_a_pepper_rotated_on_another_node_is_used_here(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with Strongroom.open(url) as here, Strongroom.open(url) as there:
        await here.rotate_pepper()
        issued = await here.keys.create(name="k")
        await there.keys.verify(issued.text)  # perhaps too early: then it must not be taken for unknown much longer
        await wait_until(lambda: _is_valid(there, issued.text))
        assert there.keys.hasher.current_id == "000002"


# --- Tenants --------------------------------------------------------------------------------------------------


async def test_a_caller_bound_to_a_tenant_sees_and_changes_only_its_keys(room: Strongroom, store: FaultyStore) -> None:
    mine = await room.keys.create(name="mine", tenant="acme")
    other = await room.keys.create(name="other", tenant="beta")
    root = await room.keys.create(name="root", tenant=ALL_TENANTS)
    handle = room.tenant("acme", actor="user:ada").context
    for context in (ACME, handle):
        assert [key.id for key in (await room.keys.list(context=context)).items] == [mine.key.id]
        assert (await room.keys.list(context=context, tenant="beta")).items == []
        assert (await room.keys.get(mine.key.id, context=context)).name == "mine"
        for issued in (other, root):
            id = issued.key.id
            for call in (
                room.keys.get(id, context=context),
                room.keys.update(id, name="x", context=context),
                room.keys.disable(id, context=context),
                room.keys.rotate(id, context=context),
                room.keys.delete(id, context=context),
                room.keys.stats(id, context=context),
                room.keys.record(key_id=id, cost={"tokens": 1}, context=context),
                room.keys.record(key=issued.text, cost={"tokens": 1}, context=context),
            ):
                with pytest.raises(NotFound):
                    await call
    for tenant in ("beta", ALL_TENANTS):
        with pytest.raises(Denied):
            await room.keys.create(name="x", tenant=tenant, context=ACME)
    assert (await store.changes(None)).records[-1].action == "deny"
    assert len((await room.keys.list()).items) == 3
    assert (await room.keys.verify(other.text, tenant="acme")).code == "NOT_FOUND"
    assert (await room.keys.verify(other.text, tenant="beta")).valid
    assert (await room.keys.list(tenant="beta")).items[0].id == other.key.id


async def test_a_user_who_is_not_an_administrator_cannot_create_or_change_keys(room: Strongroom) -> None:
    user = Context("acme", "user:ada", {"tenant": "acme"})
    issued = await room.keys.create(name="k", tenant="acme")
    for call in (
        room.keys.create(name="x", tenant="acme", context=user),
        room.keys.update(issued.key.id, name="x", context=user),
        room.keys.rotate(issued.key.id, context=user),
        room.keys.delete(issued.key.id, context=user),
    ):
        with pytest.raises(Denied):
            await call
    assert (await room.keys.verify(issued.text)).valid


async def test_keys_are_listed_newest_first_by_tenant_and_user_in_pages(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        for number in range(5):
            clock.shift(1)
            await room.keys.create(name=f"k{number}", tenant="acme", user_id=f"u{number % 2}")
        await room.keys.create(name="other", tenant="beta", user_id="u0")
    names, cursor = [], None
    while True:
        page = await room.keys.list(tenant="acme", user_id="u0", limit=2, cursor=cursor)
        names += [key.name for key in page.items]
        cursor = page.next_cursor
        if cursor is None:
            break
    assert names == ["k4", "k2", "k0"]
    with pytest.raises(InvalidInput):
        await room.keys.list(limit=0)


# --- Changing -------------------------------------------------------------------------------------------------


async def test_changing_a_limit_keeps_its_usage(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("tokens", 100)])
    await room.keys.verify(issued.text, cost={"tokens": 60})
    await room.keys.update(issued.key.id, limits=[rolling("tokens", 70), rolling("requests", 5)])
    answer = await room.keys.verify(issued.text, cost={"tokens": 11})
    assert (answer.code, answer.limits[0].used, answer.limits[0].remaining) == ("USAGE_EXCEEDED", 60, 10)
    await room.keys.update(issued.key.id, limits=[rolling("tokens", 50)])
    answer = await room.keys.verify(issued.text, cost={"tokens": 1})
    assert (answer.limits[0].used, answer.limits[0].remaining) == (60, 0)
    await room.keys.update(issued.key.id, limits=[])
    assert (await room.keys.verify(issued.text, cost={"tokens": 500})).limits == []


async def test_an_update_with_an_expected_version_and_one_without(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k")
    newer = await room.keys.update(issued.key.id, name="new", expected=issued.key.version)
    with pytest.raises(Conflict):
        await room.keys.update(issued.key.id, name="old", expected=issued.key.version)
    commits = len(store.batches)
    assert await room.keys.update(issued.key.id, name="new") == newer  # nothing to change: nothing is written
    assert len(store.batches) == commits
    with pytest.raises(InvalidInput):
        await room.keys.update(issued.key.id, tenant="beta")  # type: ignore[call-arg]
    with pytest.raises(NotFound):
        await room.keys.update("none", name="x")


async def test_a_deleted_key_leaves_nothing(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])
    unused = await room.keys.create(name="unused")
    await room.keys.verify(issued.text)
    for one in (issued, unused):
        await room.keys.delete(one.key.id, purge=True)
        assert (await room.keys.verify(one.text)).code == "NOT_FOUND"
        assert await store.get("key_usage", None, one.key.id) is None
        with pytest.raises(NotFound):
            await room.keys.delete(one.key.id, purge=True)


async def test_a_key_that_changes_at_every_attempt_raises_conflict(
    room: Strongroom, monkeypatch: pytest.MonkeyPatch
) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("requests", 5)])

    def charge(*args: Any, **options: Any) -> asyncio.Future[Any]:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        future.set_exception(usage.KeyChanged())
        return future

    monkeypatch.setattr(room.ledger, "admit", charge)
    monkeypatch.setattr(backoff, "RETRY_FOR_S", 0.02)
    with pytest.raises(Unavailable, match="changed too quickly"):
        await room.keys.verify(issued.text)
    with pytest.raises(Unavailable, match="changed too quickly"):
        await room.keys.record(key=issued.text, cost={"requests": 1})


async def test_statistics_show_the_usage_of_every_limit(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(
            name="k", limits=[rolling("tokens", 100), Limit(resource="cost", limit=5, window=Total())]
        )
        await room.keys.verify(issued.text, cost={"tokens": 10, "cost": Decimal("0.25")})
        clock.shift(10)
        await room.keys.record(key=issued.text, cost={"tokens": 5, "images": 2})
        clock.shift(10)
        await room.keys.verify(issued.text, cost={"tokens": 500})
        stats = await room.keys.stats(issued.key.id)
        assert (stats.count, stats.last_used_at) == (2, MOMENT + timedelta(seconds=10))
        assert stats.totals == {"cost": Decimal("0.25"), "images": 2, "tokens": 15}
        assert [limit.used for limit in stats.limits] == [15, Decimal("0.25")]
        assert not stats.expired
        clock.shift(7200)
        assert [limit.used for limit in (await room.keys.stats(issued.key.id)).limits] == [0, Decimal("0.25")]


# --- Secrets --------------------------------------------------------------------------------------------------


async def test_no_journal_log_error_or_repr_shows_a_secret(
    room: Strongroom, store: FaultyStore, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    issued = await room.keys.create(name="k", context=ADMIN, idempotency_key="i", limits=[rolling("tokens", 5)])
    rotated = await room.keys.rotate(issued.key.id, overlap_s=60, context=ADMIN, idempotency_key="r")
    await imported(room, "sk-imported-secret-text")
    said = [repr(await room.keys.verify("sk-imported-secret-text"))]
    texts = [issued.text, rotated.text, "sk-imported-secret-text"]
    for text in texts:
        said.append(repr(await room.keys.verify(text, cost={"tokens": 50})))
        said.append(repr(await room.keys.verify(text[:-1])))
        for call in (
            room.keys.verify(text, cost={"X": 1}),
            room.keys.record(key=text + "x", cost={"tokens": 1}),
            room.keys.update(issued.key.id, metadata={"a": text * 10_000}),
            room.database.create(SYSTEM, await room.keys.get(issued.key.id)),
        ):
            with pytest.raises((InvalidInput, NotFound, AlreadyExists)) as caught:
                await call
            said += [str(caught.value), repr(caught.value)]
    said += [repr((await store.changes(None)).records), repr((await room.keys.list()).items), caplog.text]
    said += [repr(document) for document in await _everything(store)]
    secrets = [*texts, *(text[-49:-6] for text in texts[:2])]
    for line in said:
        assert not [secret for secret in secrets if secret in line]
    peppers = [document["secret"] for document in await _documents(store, "peppers")]
    journal = repr((await store.changes(None)).records)
    assert all(repr(secret)[2:-1] not in journal and secret.hex() not in journal for secret in peppers)
    for file in tmp_path.glob("store.db*"):  # noqa: ASYNC240 - nor in any file, free pages included
        content = file.read_bytes()
        assert not [secret for secret in secrets if secret.encode() in content]


async def _documents(store: FaultyStore, collection: str) -> list[dict[str, Any]]:
    return await store.store.find(collection, None, Query(limit=1000))


async def _everything(store: FaultyStore) -> list[dict[str, Any]]:
    return [d for name in ("api_keys", "idempotent_calls", "key_usage") for d in await _documents(store, name)]


async def test_the_repr_of_an_issued_key_hides_its_secret(room: Strongroom) -> None:
    issued = await room.keys.create(name="k")
    assert issued.text not in repr(issued)
    assert issued.text not in str(issued)
    assert issued.key.hash.partition(":")[2] not in repr(await room.keys.verify(issued.text))


# --- Deleting and restoring -----------------------------------------------------------------------------------


async def run_key_work(room: Strongroom) -> None:
    """What the background does to keys, now."""
    (job,) = [job for job in room.background.jobs if job.name == "keys"]
    turn = await room.background.leases.acquire("keys")
    assert turn is not None
    await job.run(turn)
    await turn.release(done=True)


async def test_a_deleted_key_is_unknown_at_once_and_comes_back_as_it_was(room: Strongroom, store: FaultyStore) -> None:
    first = await room.keys.create(
        name="k", tenant="acme", limits=[rolling("tokens", 100)], metadata={"a": 1}, permissions=["strongroom:read"]
    )
    second = await room.keys.rotate(first.key.id, overlap_s=3_600)
    id = first.key.id
    await room.keys.verify(first.text, cost={"tokens": 60})
    await room.keys.delete(id, context=ACME)
    for text in (first.text, second.text):
        assert (await room.keys.verify(text, cost={"tokens": 1})).code == "NOT_FOUND"
        assert await room.keys.authenticate(text) is None
    for call in (
        room.keys.get(id),
        room.keys.update(id, name="x"),
        room.keys.disable(id),
        room.keys.rotate(id),
        room.keys.claim(id),
        room.keys.delete(id),
        room.keys.stats(id),
        room.keys.record(key=first.text, cost={"tokens": 1}),
        room.keys.record(key_id=id, cost={"tokens": 1}),
        room.keys.restore(id, context=Context("beta", "key:b", {"admin": True, "tenant": "beta"})),
    ):
        with pytest.raises(NotFound):
            await call
    assert (await room.keys.list()).items == []
    (deleted,) = (await room.keys.list(deleted=True)).items
    assert deleted.deleted_at is not None
    assert (await used(store, id)) == {"tokens": 60}
    restored = await room.keys.restore(id, context=ACME)
    assert restored == await room.keys.restore(id)
    ignored = {"version", "updated_at", "deleted_at", "due_at"}
    assert restored.model_dump(exclude=ignored) == second.key.model_dump(exclude=ignored)
    assert (restored.deleted_at, restored.due_at) == (None, None)
    for text in (first.text, second.text):
        assert (await room.keys.verify(text, cost={"tokens": 10})).valid
    assert (await room.keys.stats(id)).totals == {"tokens": 80}


async def test_a_deleted_key_answers_like_an_unknown_key(room: Strongroom) -> None:
    issued = await room.keys.create(name="k", tenant="acme", user_id="u1", permissions=["a"], metadata={"secret": 1})
    await room.keys.delete(issued.key.id)
    unknown = await room.keys.verify("sk-nobody-has-this-one")
    assert await room.keys.verify(issued.text) == unknown
    reserved = await room.keys.reserve(issued.text)
    assert {name: getattr(reserved, name) for name in unknown.__struct_fields__} == {
        name: getattr(unknown, name) for name in unknown.__struct_fields__
    }


async def test_a_deleted_key_is_removed_for_good_after_its_time(room: Strongroom, store: FaultyStore) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(name="k", limits=[rolling("tokens", 100)], rotate_every_s=86_400)
        other = await room.keys.create(name="other")
        await room.keys.verify(issued.text, cost={"tokens": 1})
        clock.shift(3_600)
        await room.keys.delete(issued.key.id)
        clock.shift(timedelta(seconds=RESTORABLE_FOR_S - 1))
        await run_key_work(room)  # it does not rotate what was deleted either
        assert (await room.keys.get(issued.key.id, deleted=True)).hash == issued.key.hash
        clock.shift(1)
        with pytest.raises(NotFound):
            await room.keys.restore(issued.key.id)
        await run_key_work(room)
        assert await store.get("api_keys", None, issued.key.id) is None
        assert await store.get("key_usage", None, issued.key.id) is None
        assert (await store.changes(None)).records[-1].action == "delete"
        assert (await room.keys.verify(other.text)).valid


async def test_a_restored_key_that_was_due_to_be_rotated_is_rotated(room: Strongroom) -> None:
    with time_machine.travel(MOMENT, tick=False) as clock:
        issued = await room.keys.create(name="k", rotate_every_s=86_400)
        await room.keys.delete(issued.key.id)
        clock.shift(10 * 86_400)
        restored = await room.keys.restore(issued.key.id)
        assert restored.due_at == restored.next_rotation_at == MOMENT + timedelta(days=1)
        await run_key_work(room)
        assert (await room.keys.get(issued.key.id)).unclaimed
        assert (await room.keys.verify(issued.text)).valid


async def test_the_secret_of_a_deleted_key_stays_taken_until_its_purge(room: Strongroom) -> None:
    key = await imported(room, "sk-imported")
    await room.keys.delete(key.id)
    with pytest.raises(AlreadyExists):
        await imported(room, "sk-imported")
    await room.keys.delete(key.id, purge=True)
    await imported(room, "sk-imported")
    assert (await room.keys.verify("sk-imported")).valid


def _killed_at(number: int, n: int, batch: Any) -> Fault | None:
    return Fault("before", Unavailable("killed")) if n == number else None


async def test_an_interrupted_purge_is_completed_by_the_same_call(room: Strongroom, store: FaultyStore) -> None:
    """It is two commits: the key is marked, then removed with its usage. Between them it is a deleted key."""
    issued = await room.keys.create(name="k", limits=[rolling("tokens", 100)])
    await room.keys.verify(issued.text, cost={"tokens": 1})
    for broken in (0, 1):
        number = len(store.batches) + broken
        store.fault = partial(_killed_at, number)
        with pytest.raises(Unavailable):
            await room.keys.delete(issued.key.id, purge=True, idempotency_key="p")
        assert (await room.keys.verify(issued.text, cost={})).valid is (broken == 0)
        assert await store.get("key_usage", None, issued.key.id) is not None
    store.fault = lambda n, batch: None
    for _ in range(2):
        await room.keys.delete(issued.key.id, purge=True, idempotency_key="p")
    assert await store.get("api_keys", None, issued.key.id) is None
    assert await store.get("key_usage", None, issued.key.id) is None


async def test_a_purge_under_load_leaves_nothing(room: Strongroom, store: FaultyStore) -> None:
    issued = await room.keys.create(name="k", limits=[rolling("requests", 10**9)])
    free = await room.keys.create(name="free")

    async def use(text: str) -> None:
        valid = True
        while valid:
            valid = (await room.keys.verify(text)).valid
            await asyncio.sleep(0)  # a key in memory without limits is verified without a pause

    users = [asyncio.create_task(use(text)) for text in (issued.text, free.text) for _ in range(3)]
    await wait_until(lambda: store.get("key_usage", None, issued.key.id))
    for one in (issued, free):
        await room.keys.delete(one.key.id, purge=True)
    await asyncio.gather(*users)
    for one in (issued, free):
        assert await store.get("api_keys", None, one.key.id) is None

    async def nothing_is_left() -> bool:
        return all([await store.get("key_usage", None, one.key.id) is None for one in (issued, free)])

    await wait_until(nothing_is_left)


async def test_a_caller_who_may_not_delete_purges_nothing(room: Strongroom, store: FaultyStore) -> None:
    user = Context("acme", "user:ada", {"tenant": "acme"})
    issued = await room.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 100)])
    await room.keys.verify(issued.text, cost={"tokens": 1})
    with pytest.raises(Denied):
        await room.keys.delete(issued.key.id, purge=True, context=user)
    await room.keys.delete(issued.key.id)
    for call in (
        room.keys.delete(issued.key.id, purge=True, context=user),
        room.keys.restore(issued.key.id, context=user),
    ):
        with pytest.raises(Denied):
            await call
    assert await used(store, issued.key.id) == {"tokens": 1}


# --- What a key is for ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("allowed", "asked", "admitted"),
    [
        ([], None, True),
        ([], "anything", True),
        (["small"], "small", True),
        (["small"], "smaller", False),
        (["small"], None, False),
        (["small"], "", False),
        (["small", "large-*"], "large-2", True),
        (["large-*"], "large-", True),
        (["large-*"], "large", False),
        (["large-*"], "xlarge-2", False),
        (["*"], "anything", True),
        (["*"], None, False),
        (["Small"], "small", False),
    ],
)
@pytest.mark.parametrize("what", ["model", "route"])
def test_models_and_routes_match_with_wildcards(
    what: str, allowed: list[str], asked: str | None, admitted: bool
) -> None:
    fields: dict[str, Any] = {f"allowed_{what}s": allowed}
    key = CachedKey(ApiKey(id="k", tenant="t", name="n", hash="h", display="d", **fields))
    answer = usable(key, KeyUse(ONE_REQUEST, **{what: asked}), 0)
    assert (answer is key) is admitted
    if isinstance(answer, Verification):
        assert answer.code == "INSUFFICIENT_PERMISSIONS"
        assert answer.message == f"the key is for certain {what}s, " + (
            "and none was named" if asked is None else f"not for {asked!r}"
        )


async def test_a_key_for_certain_models_is_refused_for_others_and_nothing_is_debited(
    room: Strongroom, store: FaultyStore
) -> None:
    issued = await room.keys.create(
        name="k", allowed_models=["small"], allowed_routes=["GET /v1/*"], limits=[rolling("requests", 5)]
    )
    good: dict[str, Any] = {"model": "small", "route": "GET /v1/chat"}
    wrong: list[dict[str, Any]] = [
        {},
        {"model": "small"},
        {"route": "GET /v1/x"},
        {**good, "model": "large"},
        {**good, "route": "POST /v1/chat"},
    ]
    for named in wrong:
        assert (await room.keys.verify(issued.text, **named)).code == "INSUFFICIENT_PERMISSIONS"
    assert await used(store, issued.key.id) == {}
    assert (await room.keys.verify(issued.text, **good)).valid
    long = (await room.keys.verify(issued.text, model="x" * 10_000)).message
    assert long is not None
    assert len(long) < 200
    await room.keys.update(issued.key.id, allowed_models=[], allowed_routes=[])
    assert (await room.keys.verify(issued.text)).valid


async def test_a_secret_shows_its_environment(room: Strongroom) -> None:
    live, test, own = [
        await room.keys.create(name="k", **fields)
        for fields in list[dict[str, Any]](({}, {"environment": "test"}, {"environment": "test", "prefix": "acme"}))
    ]
    assert [issued.key.environment for issued in (live, test, own)] == ["live", "test", "test"]
    assert live.text.startswith("sr_SR1")
    assert test.text.startswith("sr_test_SR1")
    assert test.key.display.startswith("sr_test_SR1")
    assert own.text.startswith("acme_SR1")
    for issued in (live, test, own):
        rotated = await room.keys.rotate(issued.key.id)
        assert rotated.text[: rotated.text.index("SR1")] == issued.text[: issued.text.index("SR1")]
    key = await imported(room, "sk-imported", environment="test")
    assert (await room.keys.rotate(key.id)).text.startswith("sr_test_SR1")
    with pytest.raises(InvalidInput, match="environment"):
        await room.keys.update(live.key.id, environment="test")  # type: ignore[call-arg]


# --- A cost that nothing counts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_an_uncounted_cost_is_reported_except_the_implied_request(limits: str) -> None:
    async with opened("json://:memory:", limits=limits) as (room, _):
        await room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("credits", 100)])
        for_some = Limit(resource="images", limit=9, window=Total(), models=("m-*",))
        made = await room.keys.create(name="k", tenant="acme", limits=[rolling("tokens", 100), for_some])
        none = await room.keys.create(name="k")

        async def told(cost: dict[str, int] | None, text: str = made.text) -> list[list[str]]:
            """By a verification, twice (the second may be from a lease), a batch, a reservation and its settlement."""
            answers = [await room.keys.verify(text, cost=cost) for _ in range(2)]
            answers += await room.keys.verify_many([{"text": text, "cost": cost}])
            held = await room.keys.reserve(text, cost=cost)
            answers.append(held)
            if cost is not None:
                answers.append(await room.keys.settle(held.reservation_id or "", cost))
            assert all(answer.valid for answer in answers)
            return [answer.uncounted for answer in answers]

        assert await told(None) == [[]] * 4
        assert await told(None, none.text) == [[]] * 4
        assert await told({"tokens": 1, "credits": 1, "images": 1}) == [[]] * 5
        assert await told({"token": 1, "requests": 1, "tokens": 1}) == [["token"]] * 5
        assert await told({"tokens": 1}, none.text) == [["tokens"]] * 5
        denied = await room.keys.verify(made.text, cost={"tokens": 999, "token": 1})
        assert (denied.code, denied.uncounted) == ("USAGE_EXCEEDED", ["token"])
        assert (await room.keys.record(key=made.text, cost={"token": 1})).uncounted == ["token"]
        events = [Usage({name: 1}, key=made.text, model=name) for name in ("token", "tokens", "credit", "token")]
        (answer,) = await room.keys.record_many(events)
        assert sorted(answer.uncounted) == ["credit", "token"]


# --- Dry runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_dry_run_answers_as_the_verification_and_counts_nothing(limits: str, tmp_path: Path) -> None:
    windows: list[Any] = [Calendar(unit="day"), Anchored(seconds=60), Total()]
    async with opened(new_url("sqlite", tmp_path), limits=limits) as (room, store):
        await room.quotas.put(kind="tenant", tenant="acme", limits=[rolling("tokens", 250)])
        for_one = Limit(resource="tokens", limit=30, window=Total(), models=("large",))
        own = [Limit(resource="tokens", limit=100, window=window) for window in windows]
        made = await room.keys.create(name="k", tenant="acme", limits=[*own, for_one], permissions=["chat"])
        plain = await room.keys.create(name="k")
        asks: list[dict[str, Any]] = [
            {"cost": {"tokens": 40}},
            {"cost": {"tokens": 20}, "model": "large"}, {"cost": {"tokens": 20}, "model": "large"},
            {"permission": "admin"}, {"cost": {"tokens": 90}}, {"tenant": "globex"}, {"cost": {"token": 1}}, {},
        ]  # fmt: skip
        for ask in asks:
            commits, before = len(store.batches), await room.keys.stats(made.key.id)
            peeked = [await room.keys.verify(made.text, peek=True, **ask) for _ in range(3)]
            after = await room.keys.stats(made.key.id)
            assert (after.count, after.totals, len(store.batches)) == (before.count, before.totals, commits)
            answer = await room.keys.verify(made.text, **ask)
            for one in peeked:
                assert without_times(one) == without_times(answer), ask
        assert (await room.keys.verify("sr_unknown", peek=True)).code == "NOT_FOUND"
        assert (await room.keys.verify(plain.text, peek=True)).valid
        assert (await room.keys.stats(plain.key.id)).count == 0
        with pytest.raises(InvalidInput):
            await room.keys.verify(made.text, cost={"tokens": -1}, peek=True)


def without_times(answer: Any) -> Any:
    """An answer without its times, and without what of a use is recorded or leased."""
    shown = [(limit.resource, limit.limit, limit.used, limit.exceeded, limit.subject) for limit in answer.limits]
    return answer.valid, answer.code, answer.key_id, answer.uncounted, shown, answer.retry_after_s is None
