"""The keys service: one order of checks whichever call decides, and calls that are those of its parts."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import AsyncMock, create_autospec

import pytest

from strongroom import Limit, Rolling, Strongroom, Tenant
from strongroom.keys import Keys, Verification
from strongroom.keys.verifier import Verifier

ASKED: dict[str, Any] = {"permission": "write", "ip": "192.0.2.1", "model": "large", "route": "GET /v1/chat"}
Decide = Callable[[Strongroom, str], Awaitable[Verification]]


async def _started(room: Strongroom, text: str) -> Verification:
    await room.keys.identify(text)  # `start` decides on keys that are in memory
    started = room.keys.verifier.start(text, tenant="acme", **ASKED)
    assert isinstance(started, Verification)
    return started


DECISIONS: dict[str, Decide] = {
    "verify": lambda room, text: room.keys.verify(text, tenant="acme", **ASKED),
    "dry run": lambda room, text: room.keys.verify(text, tenant="acme", peek=True, **ASKED),
    "once": lambda room, text: room.keys.verify(text, tenant="acme", idempotency_key=text, **ASKED),
    "many": lambda room, text: _first(room.keys.verify_many([{"text": text, "tenant": "acme", **ASKED}])),
    "start": _started,
    "reserve": lambda room, text: room.keys.reserve(text, tenant="acme", **ASKED),
    "durable reserve": lambda room, text: room.keys.reserve(text, tenant="acme", durable=True, **ASKED),
}


async def _first(answers: Awaitable[list[Verification]]) -> Verification:
    return (await answers)[0]


@pytest.mark.parametrize("limits", ["durable", "leased"])
@pytest.mark.parametrize("decide", DECISIONS.values(), ids=DECISIONS)
async def test_a_refusal_names_the_first_of_the_same_checks_whichever_call_decides(decide: Decide, limits: Any) -> None:
    """Another tenant's, deleted, disabled, expired, permission, model, route, address, each until it is mended; then
    the limit."""
    async with Strongroom.open("json://:memory:", limits=limits) as room:
        made = await room.keys.create(
            name="k",
            tenant="acme",
            permissions=["read"],
            allowed_models=["small"],
            allowed_routes=["POST /*"],
            allowed_ips=["10.0.0.0/8"],
            limits=[Limit(resource="requests", limit=0, window=Rolling(seconds=60))],
        )
        id, text = made.key.id, made.text
        other = await room.keys.create(name="another tenant's", tenant="other", permissions=["write"])
        assert (await decide(room, other.text)).code == "NOT_FOUND"
        await room.keys.update(id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
        await room.keys.disable(id)
        await room.keys.delete(id)
        assert (await decide(room, text)).code == "NOT_FOUND"
        await room.keys.restore(id)
        assert (await decide(room, text)).code == "DISABLED"
        await room.keys.enable(id)
        assert (await decide(room, text)).code == "EXPIRED"
        await room.keys.update(id, expires_at=None)
        for mend, part in (
            ({"permissions": ["write"]}, "permission"),
            ({"allowed_models": ["large"]}, "models"),
            ({"allowed_routes": []}, "routes"),
        ):
            answer = await decide(room, text)
            assert answer.code == "INSUFFICIENT_PERMISSIONS"
            assert part in (answer.message or "")
            await room.keys.update(id, **mend)
        assert (await decide(room, text)).code == "FORBIDDEN"
        await room.keys.update(id, allowed_ips=[])
        if decide is not DECISIONS["start"]:  # which leaves a limit to a commit
            assert (await decide(room, text)).code == "RATE_LIMITED"


async def test_the_calls_of_keys_have_the_signature_and_description_of_their_part() -> None:
    async with Strongroom.open("json://:memory:") as room:
        assert inspect.signature(room.keys.verify) == inspect.signature(room.keys.verifier.verify)
        assert room.keys.verify.__doc__ == Verifier.verify.__doc__
        assert inspect.signature(Keys.verify) == inspect.signature(Verifier.verify)
        assert not (await Keys.verify(room.keys, "unknown")).valid
        assert not (await room.keys.verify("unknown")).valid


def test_calls_that_must_be_awaited_are_mocked_as_such() -> None:
    for mocked in (create_autospec(Keys).verify, create_autospec(Tenant).get, create_autospec(Tenant).create):
        assert isinstance(mocked, AsyncMock)


async def test_a_call_of_keys_can_be_overridden_in_a_subclass() -> None:
    class Counted(Keys):
        calls = 0

        async def verify(self, text: str, **use: Any) -> Verification:
            self.calls += 1
            return await super().verify(text, **use)

    async with Strongroom.open("json://:memory:") as room:
        keys = Counted(room.database, room.ledger, room.keys.hasher)
        for _ in range(3):
            assert not (await keys.verify("unknown")).valid
        assert keys.calls == 3


@pytest.mark.parametrize("limits", ["durable", "leased"])
async def test_a_dry_run_among_several_verifications_counts_nothing_and_sees_those_before_it(limits: Any) -> None:
    async with Strongroom.open("json://:memory:", limits=limits) as room:
        made = await room.keys.create(
            name="k", limits=[Limit(resource="requests", limit=2, window=Rolling(seconds=60))]
        )
        asks: list[dict[str, Any]] = [{"text": made.text, "peek": peek} for peek in (False, True, True, False, True)]
        answers = await room.keys.verify_many(asks)
        assert [answer.valid for answer in answers] == [True, True, True, True, False]
        assert (await room.keys.stats(made.key.id)).count == 2
        assert (await room.keys.verify(made.text, peek=True)).code == "RATE_LIMITED"
