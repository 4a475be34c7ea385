"""An idempotency key identifies one request; a retry changes nothing and returns the first answer."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import pytest
from pydantic import BaseModel, Field

from strongroom import Context, Entity, Secret, Strongroom
from strongroom.database.canonical import canonical
from strongroom.database.idempotency import IdempotentCall, RequestKey
from strongroom.errors import Conflict
from strongroom.storage.port import Put
from tests.helpers.server_app import Served, serving
from tests.helpers.stores import STORES, new_url


class Part(BaseModel):
    label: str
    code: str = Field(default_factory=lambda: uuid.uuid4().hex)


class Paper(Entity, collection="papers"):
    title: str = ""
    secret: Annotated[str | None, Secret()] = None
    code: str = Field(default_factory=lambda: uuid.uuid4().hex)
    made: datetime | None = None
    price: Decimal = Decimal(0)
    more: dict[str, Any] = {}
    parts: list[Part] = []


ACME = Context("acme", "user:ada")


@pytest.fixture(params=STORES)
async def room(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Strongroom]:
    async with Strongroom.open(new_url(request.param, tmp_path), entities=[Paper]) as room:
        yield room


# --- What a request is ----------------------------------------------------------------------------------------


def test_equivalent_requests_have_the_same_canonical_bytes() -> None:
    noon = datetime(2026, 5, 5, 12, tzinfo=UTC)
    later = noon.astimezone(datetime.strptime("+0200", "%z").tzinfo)
    assert canonical({"a": 1, "b": [1.50, noon]}) == canonical({"b": [Decimal("1.5"), later], "a": Decimal("1.0")})
    assert canonical({1, 2}) == canonical({2, 1})
    assert canonical(-0.0) == canonical(0)
    assert canonical(Paper(title="t")) == canonical(Paper(title="t")), "what a default_factory makes is no request"
    assert canonical(Paper(parts=[Part(label="x")])) == canonical(Paper(parts=[Part(label="x")]))


def test_different_requests_have_different_canonical_bytes() -> None:
    values: list[object] = [
        None, True, False, 0, 1, "1", b"1", "", [], {}, [""], ["", ""], [[]], {"": ""}, ["a", "b"], ["ab"],
        [["a"], "b"], {"a": None}, {"a": "b"}, ["a", "b", "c"], Decimal("1E+30"), Decimal("1.00000000000000000001"),
        datetime(2026, 1, 1, tzinfo=UTC), "2026-01-01T00:00:00+00:00", Paper(title="t"), Paper(title="t", secret="s"),
        Paper(title="t", secret="r"), "\ud800",
    ]  # fmt: skip
    assert len({canonical(value) for value in values}) == len(values)


# --- The library ----------------------------------------------------------------------------------------------


async def test_a_second_replace_with_another_secret_is_another_request(room: Strongroom) -> None:
    database = room.database
    await database.replace(ACME, Paper(id="p", secret="one"), idempotency_key="i")
    with pytest.raises(Conflict, match="different request"):
        await database.replace(ACME, Paper(id="p", secret="two"), idempotency_key="i")
    assert (await database.get(ACME, Paper, "p")).secret == "one"
    await database.update(ACME, Paper, "p", {"secret": "two"}, idempotency_key="j")
    with pytest.raises(Conflict, match="different request"):
        await database.update(ACME, Paper, "p", {"secret": "three"}, idempotency_key="j")
    assert (await database.get(ACME, Paper, "p")).secret == "two"


async def test_an_equivalent_request_is_an_idempotent_retry(room: Strongroom) -> None:
    database = room.database
    first = await database.create(ACME, Paper(title="t", more={"a": 1, "b": {"c": 2, "d": 3}}), idempotency_key="i")
    again = await database.create(ACME, Paper(title="t", more={"b": {"d": 3, "c": 2}, "a": 1}), idempotency_key="i")
    assert again == first
    assert again.code == first.code


async def test_a_retry_returns_the_first_answer_whatever_changed_since(room: Strongroom) -> None:
    acme, new = room.tenant("acme"), Paper(id="p", title="one", price=Decimal("1.5"))
    made = await acme.create(new, idempotency_key="i")
    updated = await acme.update(Paper, "p", {"title": "two"}, idempotency_key="j")
    await acme.update(Paper, "p", {"title": "three"})
    assert await acme.create(new, idempotency_key="i") == made
    assert await acme.update(Paper, "p", {"title": "two"}, idempotency_key="j") == updated
    await acme.delete(Paper, "p")
    assert await acme.create(new, idempotency_key="i") == made
    assert await acme.update(Paper, "p", {"title": "two"}, idempotency_key="j") == updated
    assert await acme.get_or_none(Paper, "p") is None


async def test_an_idempotency_record_reveals_no_secret_without_the_pepper(room: Strongroom) -> None:
    await room.database.create(ACME, Paper(secret="hunter2"), idempotency_key="i")
    issued = await room.keys.create(name="k", idempotency_key="j")
    assert (await room.keys.create(name="k", idempotency_key="j")).text == issued.text
    from strongroom.entities.query import Query

    for call in await room.store.find(IdempotentCall.__collection__.name, None, Query()):
        assert b"hunter2" not in call["memo"]
        assert issued.text.encode() not in call["memo"]
        assert call["fingerprint"].split(":")[0] == "2"
        assert call["fingerprint"].split(":")[1] == "000001", "the pepper that it is under"


async def test_a_retry_is_recognised_after_a_pepper_rotation(room: Strongroom) -> None:
    first = await room.keys.create(name="k", idempotency_key="i")
    await room.rotate_pepper()
    again = await room.keys.create(name="k", idempotency_key="i")
    assert (again.key, again.text) == (first.key, first.text)
    with pytest.raises(Conflict, match="different request"):
        await room.keys.create(name="other", idempotency_key="i")


async def test_an_idempotency_record_of_an_earlier_version_is_neither_replayed_nor_a_conflict(
    room: Strongroom,
) -> None:
    call = IdempotentCall(fingerprint="0" * 64, written=["x"], expires_at=datetime.now(UTC) + timedelta(hours=1))
    key = RequestKey("i")
    key.request, key.scope = None, "acme"
    from strongroom.database.idempotency import Idempotency

    once = Idempotency.of(key)
    assert once is not None
    document = IdempotentCall.__codec__.encode(call)
    put = Put(IdempotentCall.__collection__.name, room.database.calls.id(ACME, once), document)
    await room.database.commit_counters([put], ACME.now_us)
    with pytest.raises(Conflict, match="earlier version"):
        await room.database.create(ACME, Paper(title="t"), idempotency_key="i")


async def test_a_long_answer_is_not_stored_and_its_retry_still_changes_nothing(room: Strongroom) -> None:
    import random

    noise = "".join(chr(random.Random(number).randrange(32, 0xD7FF)) for number in range(250_000))
    made = await room.database.create(ACME, Paper(id="p", title=noise), idempotency_key="i")
    assert await room.database.create(ACME, Paper(id="p", title=noise), idempotency_key="i") == made


# --- Over HTTP ------------------------------------------------------------------------------------------------

UNTESTED = {
    ("POST", "/v1/keys/verify"): "test_server_verify: it is no route of FastAPI",
}
LIMIT = {"resource": "tokens", "limit": 1000, "window": {"kind": "total"}}


class _Ids:
    """What the paths of the routes name."""

    def __init__(self, served: Served) -> None:
        self.served = served

    async def prepare(self, path: str) -> None:
        served = self.served
        if path.startswith("/v1/quotas"):
            for subject in ("user/acme/n", "group/acme/n", "tenant/acme"):
                await served.call("PUT", f"/v1/quotas/{subject}", {"limits": [LIMIT]})
        elif path.startswith(("/v1/webhooks", "/v1/deliveries")):
            hook = {"url": "http://127.0.0.1:9/", "allow_private": True}
            self.webhook = (await served.post("/v1/webhooks", hook)).json
        elif not path.startswith("/v1/tenants"):
            self.key = await served.make_key(limits=[LIMIT])
            self.other = await served.make_key(limits=[LIMIT])
        if path.startswith("/v1/reservations"):
            reserved = await served.post("/v1/reservations", {"key": self.key["key"], "cost": {"tokens": 5}})
            self.reservation = reserved.json["reservation_id"]


async def _requests(ids: _Ids, method: str, path: str) -> tuple[str, Any, Any]:
    """A path, a right body, and the body of another request that is right as well (or a query that makes it one)."""
    served = ids.served
    body: dict[str, Any]
    name = path.rpartition("/")[2]
    if path == "/v1/writes":
        return path, {"allowed": True, "tenant": "acme"}, {"allowed": True, "tenant": "acme", "reason": "other"}
    if path.startswith("/v1/audit/"):
        if name == "retention":
            return path.format(tenant="acme"), {"days": 400}, {"days": 500}
        if name == "lift":
            held = await served.call("POST", "/v1/audit/holds", {"reason": "a case", "tenant": "held"})
            return path.format(id=held.json["id"]), {"reason": "one"}, {"reason": "two"}
        return (
            path.format(tenant="other"),
            {"reason": "one", "user": "user:u"},
            {"reason": "two", "user": "user:u"},
        )
    if path == "/v1/tenants":
        return path, {"id": "new"}, {"id": "new", "name": "other"}
    if path.startswith("/v1/tenants/{tenant}") and path.count("/") < 5 and name in ("{tenant}", "suspend", "resume"):
        own = f"for-{name.strip('{}')}-{method.lower()}"
        if method != "POST" or name != "{tenant}":
            await served.call("POST", "/v1/tenants", {"id": own})
        at = path.format(tenant=own)
        if method == "PATCH" or (method == "POST" and name == "{tenant}"):
            return at, {"name": "one"}, {"name": "two"}
        return at, ({"reason": "one"} if name == "suspend" else None), ({"reason": "two"} if name == "suspend" else "?")
    if path.startswith("/v1/tenants/"):
        collection = path.split("/")[4]
        documents: dict[str, dict[str, Any]] = {
            "policies": {"policy_type": "t", "policy_name": "n"},
            "signals": {"signal_type": "t", "timestamp_ns": 1},
            "actions": {"action_type": "t", "source_service": "s"},
            "coordination_status": {"service_name": "s", "status": "healthy", "timestamp_ns": 1},
            "accounts": {"owner": "o", "token": "one"},
            "users": {"email": "one@example.com"},
            "service_accounts": {"name": "one"},
            "roles": {"scopes": ["read"]},
            "configurations": {"value": {"a": 1}},
            "cloud_accounts": {"provider": "aws", "account_id": "123456789012"},
        }
        new = documents[collection]
        field, value = {
            "policies": ("policy_name", "m"), "signals": ("timestamp_ns", 2), "actions": ("action_type", "u"),
            "coordination_status": ("timestamp_ns", 2), "accounts": ("token", "two"),
            "users": ("email", "two@example.com"), "service_accounts": ("name", "two"), "roles": ("scopes", ["write"]),
            "configurations": ("value", {"a": 2}), "cloud_accounts": ("account_id", "210987654321"),
        }[collection]  # fmt: skip
        there = (
            f"/v1/tenants/acme-{method.lower()}/{collection}"  # unique values of one method are not in another's way
        )
        if "{id}" not in path:
            new = {"id": "named", **new} if collection in ("roles", "configurations") else new
            return there, new, {**new, field: value}
        if method in ("PATCH", "DELETE"):
            await served.call("PUT", f"{there}/x", new)
        if method == "DELETE":
            return f"{there}/x", None, "?"
        return (
            f"{there}/x",
            (new if method == "PUT" else {field: new[field]}),
            ({**new, field: value} if method == "PUT" else {field: value}),
        )
    if path.startswith("/v1/quotas/"):
        at = path.format(kind="user", tenant="acme", name="n") if "{name}" in path else "/v1/quotas/tenant/acme"
        more = {"limits": [{**LIMIT, "limit": 5}]}
        return at, (None if method == "DELETE" else {"limits": [LIMIT]}), ("?" if method == "DELETE" else more)
    if path.startswith("/v1/reservations"):
        at = path.format(id=ids.reservation)
        if path == "/v1/reservations":
            body = {"key": ids.key["key"], "cost": {"tokens": 2}, "ttl_s": 60}
            return at, body, {**body, "ttl_s": 61}
        return (
            at,
            {"settle": {"cost": {"tokens": 2}}, "extend": {"ttl_s": 50}, "release": None}[name],
            ({"settle": {"cost": {"tokens": 3}}, "extend": {"ttl_s": 51}, "release": "?"}[name]),
        )
    if path.startswith("/v1/webhooks") or path.startswith("/v1/deliveries"):
        hook = {"url": "http://127.0.0.1:9/", "allow_private": True}
        if "deliveries" in path:
            made = (await served.post(f"/v1/webhooks/{ids.webhook['id']}/test")).json
            return path.format(id=made["id"]), None, "?"
        at = path.format(id=ids.webhook["id"])
        if path == "/v1/webhooks":
            return at, {**hook, "secret": "whsec_" + "A" * 32}, {**hook, "secret": "whsec_" + "B" * 32}
        if method == "PATCH":
            return at, {"description": "one"}, {"description": "two"}
        return (at, {"overlap_s": 5}, {"overlap_s": 6}) if name == "rotate-secret" else (at, None, "?")
    if path == "/v1/usage":
        body = {"key_id": ids.key["id"], "cost": {"tokens": 2}}
        return path, body, {**body, "key_id": ids.other["id"]}
    if path == "/v1/usage:batch":
        body = {"items": [{"key_id": ids.key["id"], "cost": {"tokens": 2}}]}
        return path, body, {"items": [{"key_id": ids.other["id"], "cost": {"tokens": 2}}]}
    if path == "/v1/leaks/policy/{tenant}":
        return path.format(tenant="acme"), {"action": "disable"}, {"action": "notify"}
    if path == "/v1/keys/leaked":
        return path, [{"token": ids.key["key"]}], [{"token": ids.other["key"]}]
    at = path.format(id=ids.key["id"])
    match path, method:
        case "/v1/keys", "POST":
            return at, {"name": "a", "metadata": {"b": 1, "a": 2}}, {"name": "a", "metadata": {"b": 1, "a": 3}}
        case "/v1/keys/{id}", "PATCH":
            return at, {"name": "one"}, {"name": "two"}
        case "/v1/writes", _:
            return at, {"allowed": True, "reason": "one"}, {"allowed": True, "reason": "two"}
        case "/v1/keys/verify:batch", _:
            return at, {"items": [{"key": ids.key["key"]}]}, {"items": [{"key": ids.other["key"]}]}
        case "/v1/keys:bulk", _:
            body = {"action": "disable", "ids": [ids.key["id"]]}
            return at, body, {**body, "action": "enable"}
        case "/v1/keys/{id}/rotate", _:
            return at, {"overlap_s": 5}, {"overlap_s": 6}
        case "/v1/keys/{id}/claim", _:
            await served.post(f"/v1/keys/{ids.key['id']}/rotate", {"hold": True})
    return at, None, "?"


async def test_every_write_over_http_honours_its_idempotency_key() -> None:
    """A route that ignores the header, or whose request this test cannot make, fails here."""
    problems: list[str] = []
    async with serving() as served:
        routes = sorted(
            (method.upper(), path)
            for path, item in served.app.api.openapi()["paths"].items()
            for method in item
            if method in ("post", "put", "patch", "delete") and (method.upper(), path) not in UNTESTED
        )
        assert len(routes) > 40
        for number, (method, path) in enumerate(routes):
            ids = _Ids(served)
            await ids.prepare(path)
            at, body, other = await _requests(ids, method, path)
            named = f"key {number}"
            first = await served.call(method, at, body, Idempotency_Key=named)
            if first.status >= 300:
                problems.append(f"{method} {path}: the first request was refused: {first}")
                continue
            await served.call("DELETE", at)  # what came after does not change the answer
            again = await served.call(method, at, body, Idempotency_Key=named)
            if path == "/v1/reservations":  # this one tells of the reservation as it is: it may have ended
                if again.json["reservation_id"] != first.json["reservation_id"]:
                    problems.append(f"{method} {path}: another reservation")
            elif (again.status, again.answer.content) != (first.status, first.answer.content):
                problems.append(f"{method} {path}: found {again} for the repeat, expected {first}")
            elif again.headers.get("etag") != first.headers.get("etag"):
                problems.append(f"{method} {path}: another ETag")
            if other == "?":  # where there is nothing else to be asked for
                refused = await served.call(method, at, body, Idempotency_Key=named, If_Match='"7"')
            else:
                refused = await served.call(method, at, other, Idempotency_Key=named)
            if (refused.status, refused.status == 409 and refused.code) != (409, "conflict"):
                problems.append(f"{method} {path}: found {refused} for another request, expected 409")
    assert not problems, "\n".join(problems)


async def test_two_concurrent_equal_requests_happen_once() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[LIMIT])
        body = {"items": [{"key": made["key"], "cost": {"tokens": 1}}]}
        answers = await asyncio.gather(
            *(served.post("/v1/keys/verify:batch", body, Idempotency_Key="k") for _ in range(5))
        )
        assert len({answer.answer.content for answer in answers}) == 1
        assert (await served.get(f"/v1/keys/{made['id']}/stats")).json["totals"] == {"tokens": 1}


async def test_a_refused_request_leaves_its_idempotency_key_unused() -> None:
    async with serving() as served:
        for _ in range(2):
            refused = await served.post("/v1/reservations/rsv_none/release", Idempotency_Key="k")
            assert refused.status == 404
        made = await served.make_key(limits=[LIMIT])
        reserved = await served.post("/v1/reservations", {"key": made["key"], "cost": {"tokens": 5}})
        at = f"/v1/reservations/{reserved.json['reservation_id']}/release"
        assert (await served.post(at, Idempotency_Key="k")).status == 200
