"""`POST /v1/keys/verify` as bare ASGI: its input and output; the library tests the decisions."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine

from strongroom.server.app import Bounds
from tests.helpers.server_app import ADMIN, TOKENS, Reply, Served, serving
from tests.helpers.waiting import wait_until

CONTRACT = {
    "valid", "code", "key_id", "tenant", "user_id", "permissions", "metadata", "limits", "retry_after_s", "message",
    "uncounted",
}  # fmt: skip


async def test_the_answer_has_exactly_the_contracts_fields() -> None:
    async with serving() as served:
        made = await served.make_key(tenant="acme", user_id="u1", permissions=["chat:write"], limits=[TOKENS])
        answer = await served.verify(made["key"], cost={"requests": 1, "tokens": 250}, permission="chat:write")
        assert answer.headers["content-type"] == "application/json"
        body = answer.json
        assert set(body) == CONTRACT
        assert (body["valid"], body["code"], body["key_id"]) == (True, "VALID", made["id"])
        assert (body["tenant"], body["user_id"], body["permissions"]) == ("acme", "u1", ["chat:write"])
        (limit,) = body["limits"]
        assert {**limit, "resets_at": ...} == {
            **TOKENS,
            "used": 250,
            "remaining": 750,
            "recorded": 250,
            "reserved": 0,
            "leased": 0,
            "resets_at": ...,
        }
        assert datetime.fromisoformat(limit["resets_at"]) > datetime.now(UTC)
        over = (await served.verify(made["key"], cost={"tokens": 751})).json
        assert (over["valid"], over["code"]) == (False, "USAGE_EXCEEDED")
        assert over["retry_after_s"] > 0
        assert over["limits"][0]["used"] == 250, "a call that is not valid debits nothing"


async def test_every_code_is_answered_200() -> None:
    async with serving() as served:
        key = await served.make_key(permissions=["chat:*"], allowed_ips=["10.0.0.0/8"])
        requests = await served.make_key(limits=[{**TOKENS, "resource": "requests", "limit": 0}])
        disabled = await served.make_key()
        await served.post(f"/v1/keys/{disabled['id']}/disable")
        expired = await served.make_key()
        await served.call("PATCH", f"/v1/keys/{expired['id']}", {"expires_at": "2020-01-01T00:00:00Z"})
        asked: list[tuple[str, dict[str, Any], str]] = [
            (key["key"], {"permission": "chat:read", "ip": "10.1.2.3"}, "VALID"),
            (key["key"], {"permission": "other", "ip": "10.1.2.3"}, "INSUFFICIENT_PERMISSIONS"),
            (key["key"], {"ip": "11.1.2.3"}, "FORBIDDEN"),
            (key["key"], {}, "FORBIDDEN"),
            (requests["key"], {}, "RATE_LIMITED"),
            (disabled["key"], {}, "DISABLED"),
            (expired["key"], {}, "EXPIRED"),
            ("nothing", {}, "NOT_FOUND"),
            ("", {}, "NOT_FOUND"),
            ("k" * 5_000, {}, "NOT_FOUND"),
        ]
        for text, more, code in asked:
            answer = await served.verify(text, **more)
            assert (answer.status, answer.code) == (200, code), (more, answer)
            assert answer.json["valid"] == (code == "VALID")


WRONG: list[tuple[bytes, list[str]]] = [
    (b"[]", [""]),
    (b"5", [""]),
    (b"null", [""]),
    (b'"text"', [""]),
    (b"{}", ["key"]),
    (b'{"key": null}', ["key"]),
    (b'{"key": 5}', ["key"]),
    (b'{"key": ["a"]}', ["key"]),
    (b'{"key": "k", "cost": 5}', ["cost"]),
    (b'{"key": "k", "cost": {"tokens": "5"}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": true}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": null}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": -1}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 1.5}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 1000000000000001}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 99999999999999999999999999999999999}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 1e999}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 1e999999999}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": 1e-999999999}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": NaN}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"tokens": -Infinity}}', ["cost.tokens"]),
    (b'{"key": "k", "cost": {"cost": 0.0000000001}}', ["cost.cost"]),
    (b'{"key": "k", "cost": {"Big Name": 1}}', ["cost.Big Name"]),
    (b'{"key": "k", "permission": 5, "ip": "localhost"}', ["ip", "permission"]),
    (b'{"key": "k", "tenant": "acme"}', ["tenant"]),
    (b'{"key": "\\ud800"}', ["key"]),
    (b'{"cost": {"a": -1, "b": NaN, "c": 1}, "ip": [], "colour": "red"}', ["colour", "cost.a", "cost.b", "ip", "key"]),
    (b'{"key": "k", "cost": {' + b", ".join(b'"r%d": 1' % n for n in range(40)) + b"}}", ["cost"]),
]


async def test_every_problem_is_reported_at_once() -> None:
    async with serving() as served:
        for body, paths in WRONG:
            answer = await served.post("/v1/keys/verify", body)
            assert (answer.status, answer.code) == (422, "invalid_input"), (body, answer)
            assert answer.paths == paths, (body, answer)


@pytest.mark.parametrize(
    "body", [b"", b"{", b"{'key': 1}", b'{"key": "k"} x', b"\xff\xfe", b'{"key": "\xff"}', b"[" * 100_000]
)
async def test_a_body_that_is_not_json_is_malformed(body: bytes) -> None:
    async with serving() as served:
        answer = await served.post("/v1/keys/verify", body)
        assert (answer.status, answer.code) == (400, "malformed_request"), answer


async def test_a_chunked_body_is_assembled_and_a_too_large_body_is_not_read_to_its_end() -> None:
    async with serving(bounds=Bounds(max_body_bytes=2_000)) as served:
        made = await served.make_key()
        whole = b'{"key": "' + made["key"].encode() + b'"}'
        taken = 0

        async def pieces() -> Any:
            for number in range(len(whole)):
                yield whole[number : number + 1]

        async def endless() -> Any:
            nonlocal taken
            while True:
                taken += 1
                yield b" " * 1_000

        authorized = {"Authorization": f"Bearer {ADMIN}"}
        answer = await served.client.post("/v1/keys/verify", content=pieces(), headers=authorized)
        assert answer.json()["code"] == "VALID"
        answer = await served.client.post("/v1/keys/verify", content=endless(), headers=authorized)
        assert (answer.status_code, answer.json()["code"]) == (413, "too_large")
        assert taken < 10
        assert (await served.post("/v1/keys/verify", b" " * 2_001)).status == 413


async def test_a_retried_verification_with_its_idempotency_key_debits_once() -> None:
    async with serving() as served:
        for limits in ([TOKENS], []):
            made = await served.make_key(limits=limits)
            body, once = {"key": made["key"], "cost": {"tokens": 100}}, f"once {len(limits)}"
            first = await served.post("/v1/keys/verify", body, Idempotency_Key=once)
            for _ in range(2):
                again = await served.post("/v1/keys/verify", body, Idempotency_Key=once)
                assert again.json["valid"]
                assert again.json == first.json
            other = await served.make_key(limits=limits)
            for another in ({"key": other["key"]}, {"model": "m"}, {"permission": "p"}, {"cost": {"tokens": 99}}):
                refused = await served.post("/v1/keys/verify", {**body, **another}, Idempotency_Key=once)
                assert refused.status == 409 or another == {"permission": "p"}, (another, refused)
                assert not refused.json.get("valid")
            stats = (await served.get(f"/v1/keys/{made['id']}/stats")).json
            assert stats["totals"] == {"tokens": 100}
        wrong = await served.post("/v1/keys/verify", {"key": made["key"]}, Idempotency_Key="x" * 300)
        assert wrong.paths == ["idempotency_key"]


async def test_a_denial_is_not_replayed_and_another_cost_under_the_same_idempotency_key_is_refused() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])

        async def ask(tokens: int, once: str) -> Reply:
            body = {"key": made["key"], "cost": {"tokens": tokens}}
            return await served.post("/v1/keys/verify", body, Idempotency_Key=once)

        first = await asyncio.gather(ask(900, "a"), ask(200, "b"))  # decided together, in one commit
        assert [answer.code for answer in first] == ["VALID", "USAGE_EXCEEDED"]
        assert (await ask(200, "b")).code == "USAGE_EXCEEDED", "a repeat of what was denied was let through"
        other = await ask(100, "a")
        assert (other.status, other.code) == (409, "conflict")
        assert (await served.get(f"/v1/keys/{made['id']}/stats")).json["totals"] == {"tokens": 900}


async def test_concurrent_requests_over_the_bound_get_429() -> None:
    async with serving(bounds=Bounds(max_concurrency=3)) as served:
        made = await served.make_key(limits=[TOKENS])
        answers = await asyncio.gather(*(served.verify(made["key"], cost={"tokens": 1}) for _ in range(10)))
        assert sorted({a.status for a in answers}) == [200, 429]
        assert all(a.headers["retry-after"] == "1" for a in answers if a.status == 429)
        assert served.app.services.verify_gate.inside == 0
        admitted = sum(a.status == 200 for a in answers)
        assert (await served.get(f"/v1/keys/{made['id']}/stats")).json["totals"] == {"tokens": admitted}


async def test_a_limit_is_never_over_admitted_through_http() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[{**TOKENS, "limit": 50}])
        answers = await asyncio.gather(*(served.verify(made["key"], cost={"tokens": 1}) for _ in range(200)))
        assert sum(a.json["valid"] for a in answers) == 50


async def test_guessed_keys_write_nothing_and_use_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strongroom.keys.cache.MAX_UNKNOWN", 300)
    async with serving(sealing=False) as served:
        await served.verify("warm up")
        before = await served.room.store.changes("end")
        commits = 0
        commit = served.room.store.commit

        def counted(batch: Any) -> Any:
            nonlocal commits
            commits += 1
            return commit(batch)

        served.room.store.commit = counted  # type: ignore[method-assign]
        for begin in range(0, 600, 200):
            guesses = (served.verify(f"guess {number}") for number in range(begin, begin + 200))
            assert {a.code for a in await asyncio.gather(*guesses)} == {"NOT_FOUND"}
        assert commits == 0
        assert (await served.room.store.changes("end")).cursor == before.cursor
        assert len(served.room.keys.cache._unknown) <= 300
        assert len(served.room.keys.cache._known) <= 2


async def test_expiry_is_exact_and_a_clock_set_back_does_not_free_a_limit() -> None:
    moment = datetime(2030, 1, 1, tzinfo=UTC)
    with time_machine.travel(moment - timedelta(hours=1), tick=False) as clock:
        async with serving() as served:
            made = await served.make_key(expires_at=moment.isoformat(), limits=[TOKENS])

            async def code(tokens: int) -> str:
                return (await served.verify(made["key"], cost={"tokens": tokens})).code

            assert await code(1000) == "VALID"
            clock.move_to(moment - timedelta(hours=9))
            assert await code(1) == "USAGE_EXCEEDED"
            clock.move_to(moment - timedelta(microseconds=1))
            assert await code(0) == "VALID"
            clock.move_to(moment)
            assert await code(0) == "EXPIRED"


async def test_a_revocation_by_another_process_takes_effect() -> None:
    """Two processes on one store are two rooms here; the bound is the journal's poll."""
    async with serving() as served:
        made = await served.make_key()
        assert (await served.verify(made["key"])).code == "VALID"
        await _revoke_behind_its_back(served, made["id"])

        async def refused() -> bool:
            return (await served.verify(made["key"])).code != "VALID"

        await wait_until(refused)
        assert (await served.verify(made["key"])).code == "DISABLED"


async def _revoke_behind_its_back(served: Served, id: str) -> None:
    from strongroom import system_context
    from strongroom.database.database import Database
    from strongroom.keys.model import ApiKey

    other = Database(served.room.store, served.room.database.registry)  # its commits tell this room's Keys nothing
    await other.update(system_context(), ApiKey, id, {"enabled": False})


async def test_a_dry_run_counts_nothing_and_its_flag_must_be_a_boolean() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        for _ in range(3):
            answer = await served.verify(made["key"], cost={"tokens": 700}, peek=True)
            assert (answer.json["valid"], answer.json["limits"][0]["used"]) == (True, 700)
        assert (await served.verify(made["key"], cost={"tokens": 700}, peek=False)).json["valid"]
        denied = (await served.verify(made["key"], cost={"tokens": 700}, peek=True)).json
        assert (denied["code"], denied["limits"][0]["used"]) == ("USAGE_EXCEEDED", 700)
        assert (await served.verify(made["key"], peek="yes")).paths == ["peek"]
        batch = await served.post("/v1/keys/verify:batch", {"items": [{"key": made["key"], "peek": True}]})
        assert batch.paths == ["items.0.peek"]
        held = await served.post("/v1/reservations", {"key": made["key"], "peek": True})
        assert held.paths == ["peek"]
