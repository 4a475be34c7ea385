"""Every path has one error shape, for failures of the framework and the store too; and the bounds."""

from __future__ import annotations

import io
import json
import logging
from datetime import UTC, datetime
from typing import Any

import pytest

from strongroom import errors as library
from strongroom.client.errors import error_of
from strongroom.errors import (
    InvalidInput,
    StorageFull,
    StoreError,
    StrongroomError,
    TooManyRequests,
    Unavailable,
)
from strongroom.server import errors, logs
from strongroom.server.app import Bounds
from tests.helpers.server_app import ADMIN, Account, serving

PATHS = [
    ("POST", "/v1/keys"), ("GET", "/v1/keys"), ("GET", "/v1/keys/admin"), ("POST", "/v1/keys/verify"),
    ("POST", "/v1/keys/verify:batch"), ("POST", "/v1/usage"), ("GET", "/v1/tenants/acme/policies"),
    ("POST", "/v1/tenants/acme/policies"), ("GET", "/v1/tenants/acme/policies/x"),
    ("PUT", "/v1/tenants/acme/policies/x"),
    ("DELETE", "/v1/tenants/acme/policies/x"), ("PATCH", "/v1/tenants/acme/policies/x"), ("GET", "/stats"),
]  # fmt: skip
BODIES = {
    "/v1/keys": {"name": "n"},
    "/v1/keys/verify": {"key": "another"},
    "/v1/keys/verify:batch": {"items": [{"key": "another"}]},
    "/v1/usage": {"key_id": "key_nobody_asked_for_yet", "cost": {"tokens": 1}},
}


def every_code() -> set[str]:
    classes = [v for module in (library, errors) for v in vars(module).values() if isinstance(v, type)]
    return {cls.code for cls in classes if issubclass(cls, StrongroomError)}


def test_each_code_has_its_status_and_nothing_else_has() -> None:
    assert set(errors.STATUS) == every_code()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unavailable("the store is away"), 503), (StorageFull(), 507), (StoreError("damaged"), 500),
        (TooManyRequests(), 429),
        (RuntimeError("secret text"), 500), (KeyError("secret text"), 500), (OSError("secret text"), 500),
    ],
)  # fmt: skip
async def test_a_store_failure_has_the_same_answer_on_every_path(error: Exception, status: int) -> None:
    async with serving() as served:
        await served.get("/v1/keys")  # the caller is known

        async def fail(*_: Any, **__: Any) -> Any:
            raise error

        for name in ("get", "find", "commit"):
            setattr(served.room.store, name, fail)
        for method, path in PATHS:
            body = BODIES.get(path, {"policy_type": "t", "policy_name": "n"})
            answer = await served.call(method, path, None if method == "GET" else body)
            if path == "/v1/keys/verify" and answer.status == 200:
                continue
            assert answer.status == status, (method, path, answer)
            assert "secret text" not in answer.answer.text


async def test_a_write_with_an_unknown_outcome_says_so() -> None:
    async with serving() as served:

        async def lost(*_: Any, **__: Any) -> Any:
            raise Unavailable("the answer was lost", outcome="unknown")

        await served.get("/v1/keys")  # the caller is known
        setattr(served.room.store, "commit", lost)  # noqa: B010
        answer = await served.post("/v1/keys", {"name": "k"})
        assert (answer.status, answer.json["outcome"]) == (503, "unknown")
        told = error_of(answer.status, answer.answer.headers, answer.answer.content)
        assert told.details["outcome"] == "unknown"
        assert "outcome" not in (await served.get("/v1/keys/nothing")).json


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (
            StorageFull("/srv/our data/s.db: the disk is full: writes are refused"),
            "the disk is full: writes are refused",
        ),
        (Unavailable("10.0.0.7:5432/app: PostgreSQL cannot be reached"), "PostgreSQL cannot be reached"),
        (StoreError("firestore://project/(default): damaged"), "damaged"),
        (Unavailable("too many nodes at once: try again"), "too many nodes at once: try again"),
    ],
)
async def test_callers_do_not_learn_where_the_store_is(error: StrongroomError, detail: str) -> None:
    async with serving() as served:

        async def fail(*_: Any, **__: Any) -> Any:
            raise error

        await served.get("/v1/keys")  # the caller is known
        setattr(served.room.store, "commit", fail)  # noqa: B010
        assert (await served.post("/v1/keys", {"name": "k"})).json["detail"] == detail


async def test_unknown_paths_and_methods_have_the_error_shape() -> None:
    async with serving() as served:
        for path in ("/nothing", "/v1/nothing", "/v2/keys", "/v1/keys/", "//v1/keys", "/v1/keys/x/y/z", "/V1/KEYS"):
            assert (await served.get(path)).status == 404, path
        for method, path, allow in (
            ("DELETE", "/v1/keys", {"GET", "POST"}), ("PUT", "/v1/keys/x", {"GET", "PATCH", "DELETE"}),
            ("POST", "/healthz", {"GET"}), ("GET", "/v1/usage", {"POST"}), ("GET", "/v1/keys/verify", {"POST"}),
            ("OPTIONS", "/v1/keys", {"GET", "POST"}),
            ("DELETE", "/v1/tenants/acme/policies", {"GET", "POST"}), ("BREW", "/v1/keys", {"GET", "POST"}),
        ):  # fmt: skip
            answer = await served.call(method, path)
            assert (answer.status, answer.code) == (405, "method_not_allowed"), (method, path, answer)
            allow |= {"HEAD"} if "GET" in allow else set()
            assert {part.strip() for part in answer.headers["allow"].split(",")} == allow, (method, path)


async def test_a_body_over_the_bound_is_not_read_to_its_end() -> None:
    async with serving(bounds=Bounds(max_body_bytes=10_000)) as served:
        for method, path in PATHS:
            if method in ("GET", "DELETE"):
                continue
            assert (await served.call(method, path, b" " * 10_001)).status == 413, path
            if path != "/v1/keys/verify":  # which takes no word for it, and counts
                assert (await served.call(method, path, b"{}", Content_Length="9" * 30)).status == 413, path
                assert (await served.call(method, path, b"{}", Content_Length="many")).status == 413, path
            taken = 0

            async def endless() -> Any:
                nonlocal taken
                while True:
                    taken += 1
                    yield b" " * 1_000

            answer = await served.client.request(
                method, path, content=endless(), headers={"Authorization": f"Bearer {ADMIN}"}
            )
            assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), path
            assert taken < 20, path


async def test_concurrent_requests_over_the_bound_get_429() -> None:
    async with serving(bounds=Bounds(max_concurrency=1)) as served:
        services = served.app.services
        services.gate.inside = services.verify_gate.inside = 1
        for method, path in PATHS:
            answer = await served.call(method, path)
            assert (answer.status, answer.code) == (429, "too_many_requests"), path
        services.gate.inside = services.verify_gate.inside = 0
        assert (await served.get("/v1/keys")).status == 200
        assert served.app.services.gate.inside == 0


@pytest.mark.parametrize("name", ["", "a" * 129, "ü", "a b", "a\tb", '"><script>'])
async def test_an_invalid_request_id_is_replaced(name: str) -> None:
    async with serving() as served:
        answer = await served.get("/v1/nothing", X_Request_Id=name.encode())
        assert answer.json["request_id"] not in (name, "")
        kept = await served.get("/v1/nothing", X_Request_Id="a.b:c-d_1")
        assert kept.json["request_id"] == "a.b:c-d_1"
        assert (await served.get("/healthz", X_Request_Id="ok")).headers["x-request-id"] == "ok"


async def test_logs_are_json_and_have_no_secret() -> None:
    stream = io.StringIO()
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    try:
        logs.configure("debug", stream)
        logging.getLogger("httpx").setLevel(logging.WARNING)  # the test's own client
        async with serving() as served:
            made = await served.make_key()
            served.app.services.access_log = True
            await served.get("/v1/keys?user_id=hunter2", key=made["key"])

            async def fail(*_: Any, **__: Any) -> Any:
                raise RuntimeError(f"hunter2 Bearer {made['key']}")

            served.room.store.find = fail  # type: ignore[method-assign]
            assert (await served.get("/v1/keys")).status == 500
            logging.getLogger("strongroom").warning("found %s and Bearer hunter2", made["key"])
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {line["message"] for line in lines} >= {"request", "request failed"}
    (failed,) = [line for line in lines if line["message"] == "request failed"]
    assert (failed["error"], failed["level"], "request_id" in failed) == ("RuntimeError", "error", True)
    assert any("fail" in place for place in failed["trace"])
    assert {"time", "level", "logger", "message", "method", "path", "status", "ms", "actor"} <= set(
        next(line for line in lines if line["message"] == "request")
    )
    for secret in ("hunter2", made["key"]):
        assert secret not in stream.getvalue()


NUMBERS = ["1700000000", "1700000000.5", "-5", "+1", "1700000000000", 1_700_000_000, 1.5]


@pytest.mark.parametrize("number", NUMBERS)
async def test_a_number_is_refused_where_a_time_is_expected(number: Any) -> None:
    async with serving() as served:
        made = await served.make_key()
        for method, path, body in (
            ("POST", "/v1/keys", {"name": "n", "expires_at": number}),
            ("PATCH", f"/v1/keys/{made['id']}", {"expires_at": number}),
            ("POST", "/v1/tenants/acme/accounts", {"owner": "o", "until": number}),
            ("PUT", "/v1/tenants/acme/accounts/a", {"owner": "o", "until": number}),
            ("PATCH", "/v1/tenants/acme/accounts/a", {"until": number}),
        ):
            refused = await served.call(method, path, body)
            assert refused.status == 422, (path, refused)
            (problem,) = refused.json["errors"]
            assert problem["path"] in ("expires_at", "until")
            assert "found" in problem["message"]
            assert "2027-01-01T00:00:00Z" in problem["message"]
        body = {"action": "disable", "filter": {"created_after": number}}
        assert (await served.post("/v1/keys:bulk", body)).paths == ["filter.created_after"]
        for query in ("keys?created_after", "keys?created_before", "tenants/acme/accounts?until__gt"):
            assert (await served.get(f"/v1/{query}={str(number).replace('+', '%2B')}")).status == 422, query
        assert len((await served.get("/v1/keys")).json["items"]) == 2
        with pytest.raises(InvalidInput):
            await served.room.keys.create(name="n", expires_at=number)
        with pytest.raises(InvalidInput):
            Account.parse({"owner": "o", "until": number})
        with pytest.raises(InvalidInput):
            Account.parse_json(json.dumps({"owner": "o", "until": number}))


async def test_a_time_is_accepted_where_a_time_is_expected() -> None:
    async with serving() as served:
        for moment in ("2027-01-01T00:00:00Z", "2027-01-01T01:00:00+01:00"):
            assert await served.make_key(expires_at=moment)
            account = await served.post("/v1/tenants/acme/accounts", {"owner": "o", "until": moment})
            assert account.status == 201, account
        assert Account.parse({"owner": "o", "until": datetime(2027, 1, 1, tzinfo=UTC)}).until is not None
