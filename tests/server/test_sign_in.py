"""Sign-in by JWT over HTTP: what a token opens, what it never opens, and how soon changes act."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.app import Tenant
from strongroom.server import auth, openapi
from strongroom.server.auth import Caller, Scope
from strongroom.storage.port import Batch, Put
from strongroom.tenants import Rights, Role, ServiceAccount, Session, User, jwks
from strongroom.tenants.tokens import MAX_TOKEN_BYTES
from tests.helpers.issuer import ISSUER, Issuer, claims, issuing, key_of, public, signed
from tests.helpers.server_app import Served, Stream, serving
from tests.helpers.server_process import running
from tests.helpers.stores import new_url
from tests.helpers.waiting import PATIENCE_S, wait_until

ROLES: dict[str, Any] = {"read": "reader", "write": "writer", "admin": "boss", "auditor": "checker"}
WITHIN_S = 1.0
"""How soon a change of a role, a user or the keys acts on every node."""


@asynccontextmanager
async def signing_in(url: str = "json://:memory:", **more: Any) -> AsyncIterator[tuple[Served, Issuer, Tenant]]:
    """An application that accepts an issuer's tokens, and the tenant `acme` with a role for each scope."""
    async with issuing() as issuer, serving(url, sign_in=issuer.settings(**more)) as served:
        acme = served.room.tenant("acme")
        for scope, role in ROLES.items():
            await acme.create(Role(id=role, scopes=cast(Any, [scope])))
        yield served, issuer, acme


# --- What a token opens ---------------------------------------------------------------------------------------


async def test_a_token_stands_wherever_a_management_key_of_its_tenant_stands() -> None:
    async with signing_in() as (served, issuer, _):
        calls = [
            ("GET", "/v1/keys", None), ("GET", "/v1/tenants/acme/policies", None), ("GET", "/v1/audit", None),
            ("POST", "/v1/keys", {"name": "n"}), ("POST", "/v1/keys/verify", {"key": "x"}),
            ("POST", "/v1/keys/verify:batch", {"items": [{"key": "x"}]}),
            ("PUT", "/v1/tenants/acme/policies/p", {"policy_type": "t", "policy_name": "n"}),
            ("POST", "/v1/keys", {"name": "n", "permissions": ["strongroom:read"]}),
            ("PUT", "/v1/tenants/acme/roles/other", {"scopes": ["read"]}),
            ("GET", "/v1/tenants/globex/policies", None), ("GET", "/v1/audit?tenant=globex", None),
            ("POST", "/v1/keys", {"name": "n", "tenant": "globex"}),
            ("POST", "/v1/keys", {"name": "n", "tenant": "*", "permissions": ["strongroom:admin"]}),
            ("PUT", "/v1/leaks/policy/*", {"action": "disable"}),
        ]  # fmt: skip
        for scope, role in ROLES.items():
            token = issuer.token(roles=[role], sub=role)
            key = await served.manager(scope, "acme")
            for method, path, body in calls:
                with_key, with_token = [await served.call(method, path, body, key=one) for one in (key, token)]
                same = {with_key.status, 200 if method == "PUT" and with_key.status == 201 else with_key.status}
                assert with_token.status in same, (scope, method, path, with_token, with_key)


async def test_a_token_without_a_role_of_its_tenant_opens_nothing() -> None:
    async with signing_in() as (served, issuer, _):
        for roles in (None, [], ["stranger"], ["*"], ["admin", "strongroom:admin"]):
            answer = await served.get("/v1/keys", key=issuer.token(roles=roles))
            assert answer.status == 403
            assert "(none) give no scope" in answer.json["detail"]
        answer = await served.get("/v1/keys", key=issuer.token(tenant="globex", roles=["boss"]))
        assert answer.status == 403, "a role of acme gave something in globex"


async def test_several_roles_give_what_each_of_them_gives() -> None:
    async with signing_in() as (served, issuer, acme):
        await acme.create(Role(id="odd", scopes=["auditor", "read"], permissions=["chat:write"]))
        token = issuer.token(roles="odd stranger")
        assert (await served.get("/v1/keys", key=token)).status == 200
        assert (await served.get("/v1/audit", key=token)).status == 200
        assert (await served.post("/v1/keys", {"name": "n"}, key=token)).status == 403


async def test_roles_of_a_users_document_count_beside_those_of_the_token() -> None:
    async with signing_in() as (served, issuer, acme):
        await acme.create(User(id="u1", email="ann@acme.example", external_subject="ann", roles=["writer"]))
        await acme.create(ServiceAccount(id="s1", name="nightly", external_subject="robot", roles=["reader"]))
        await acme.create(User(id="bob", email="bob@acme.example", roles=["reader"]))
        await acme.create(User(id="eve", email="eve@acme.example", external_subject="somebody", roles=["boss"]))
        assert (await served.post("/v1/keys", {"name": "n"}, key=issuer.token(sub="ann"))).status == 201
        for subject, status in (("robot", 200), ("bob", 200), ("eve", 403), ("u1", 403)):
            assert (await served.get("/v1/keys", key=issuer.token(sub=subject))).status == status, subject


async def test_over_http_only_administrators_write_what_decides_about_callers() -> None:
    """A writer could make itself a role otherwise."""
    async with signing_in() as (served, issuer, _):
        writer = issuer.token(roles=["writer"])
        for caller in (writer, await served.manager("write", "acme"), await served.manager("write")):
            for path, body in (
                ("roles/mine", {"scopes": ["admin"]}),
                ("users/u", {"email": "a@b.example", "roles": ["boss"]}),
                ("service_accounts/s", {"name": "s", "roles": ["boss"]}),
            ):
                for method in ("PUT", "PATCH", "DELETE"):
                    answer = await served.call(method, f"/v1/tenants/acme/{path}", body, key=caller)
                    assert (answer.status, "strongroom:admin" in answer.json["detail"]) == (403, True), path
                created = await served.post(f"/v1/tenants/acme/{path.partition('/')[0]}", body, key=caller)
                assert created.status == 403
        admin = issuer.token(roles=["boss"])
        assert (await served.call("PUT", "/v1/tenants/acme/roles/mine", {"scopes": ["read"]}, key=admin)).status == 201
        assert (await served.get("/v1/tenants/acme/roles", key=writer)).status == 200


async def test_a_role_that_names_an_unknown_scope_is_refused_and_gives_only_the_others_if_it_is_stored(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with signing_in() as (served, issuer, _):
        refused = await served.call("PUT", "/v1/tenants/acme/roles/r", {"scopes": ["root", "read"]})
        assert (refused.status, refused.paths) == (422, ["scopes.0"])
        # A later version may have stored it.
        later = Role.__codec__.encode(Role(id="later", scopes=["read"])) | {"scopes": ["root", "read"]}
        await served.room.store.commit(Batch("acme", (Put("roles", "later", later),), time.time_ns() // 1_000))
        token = issuer.token(roles=["later"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        assert (await served.post("/v1/keys", {"name": "n"}, key=token)).status == 403
        assert "the role 'later' of tenant 'acme' names unknown scopes, which give nothing: root" in caplog.text


# --- Who acts -------------------------------------------------------------------------------------------------


async def test_a_record_names_the_user_and_has_the_claims_of_its_token(url: str) -> None:
    async with signing_in(url) as (served, issuer, _):
        token = issuer.token(roles=["writer"], email="ann@acme.example", deep={"a": [1, 2.5, None, "é"]})
        made = await served.post("/v1/tenants/acme/policies", {"policy_type": "t", "policy_name": "n"}, key=token)
        assert made.status == 201, made
        assert (await served.get("/v1/tenants/globex/policies", key=token)).status == 403
        records = (await served.room.store.changes(None)).records
        ours = [record for record in records if record.actor == "user:ann"]
        assert [(record.action, record.collection) for record in ours] == [("create", "policies"), ("deny", "policies")]
        for record in ours:
            assert record.claims is not None
            assert record.claims["email"] == "ann@acme.example"
            assert record.claims["deep"] == {"a": [1, 2.5, None, "é"]}
            assert record.claims["iss"] == ISSUER
        assert {record.claims for record in records if record.actor != "user:ann"} <= {None}


async def test_users_of_two_tenants_with_one_name_share_no_idempotency_key() -> None:
    async with signing_in() as (served, issuer, _):
        await served.room.tenant("globex").create(Role(id="writer", scopes=["write"]))
        for tenant in ("acme", "globex"):
            token = issuer.token(tenant=tenant, roles=["writer"])
            key = (await served.make_key(tenant=tenant, limits=[]))["key"]
            for path, body in (
                ("/v1/keys/verify", {"key": key}),
                ("/v1/usage", {"key": key, "cost": {"tokens": 1}}),
                ("/v1/usage:batch", {"items": [{"key": key, "cost": {"tokens": 1}}]}),
                ("/v1/reservations", {"key": key, "cost": {"tokens": 1}}),
                ("/v1/keys/verify:batch", {"items": [{"key": key}]}),
                ("/v1/keys", {"name": "n"}),
            ):
                answer = await served.post(path, body, key=token, Idempotency_Key=f"one {path}")
                assert answer.status in (200, 201), (tenant, path, answer)
                if path == "/v1/reservations":
                    assert answer.json["valid"], answer
                if "tenant" in answer.json:
                    assert answer.json["tenant"] == tenant, path


# --- What a token never is ------------------------------------------------------------------------------------

_OWN = {"scope", "tenant", "user_id", "roles", "permissions", "token", "admin"}
_VALUE = st.none() | st.booleans() | st.text(max_size=9) | st.lists(st.just("admin"), max_size=2)


class _Source:
    stale = False


class _Now:
    def now_us(self) -> int:
        return time.time_ns() // 1_000


def _caller(scopes: frozenset[str], found: dict[str, Any]) -> Caller:
    session = Session("ann", "acme", Rights(("r",), scopes, ("chat",)), found, 2**52, _Source())
    return Caller.of_session(b"", session, _Now())


@given(
    scopes=st.frozensets(st.sampled_from(["read", "write", "admin", "auditor"])),
    found=st.dictionaries(
        st.sampled_from(["admin", "scope", "key_id", "tenant", "user_id", "roles", "permissions", "token", "is_admin"]),
        _VALUE,
    ),
)
def test_no_claim_of_a_token_changes_what_strongroom_itself_knows_of_the_caller(
    scopes: frozenset[str], found: dict[str, Any]
) -> None:
    hostile, plain = _caller(scopes, found), _caller(scopes, {})
    assert hostile.claims["token"] == found
    assert {**hostile.claims, "token": {}} == {**plain.claims, "token": {}}
    assert hostile.claims.keys() <= _OWN
    assert (hostile.tenant, hostile.scope, hostile.audits, hostile.actor) == (
        "acme",
        plain.scope,
        plain.audits,
        "user:ann",
    )
    assert hostile.context("acme", "").is_admin == (plain.scope > Scope.NONE)


async def test_a_token_that_claims_everything_gets_what_its_roles_give() -> None:
    everything: dict[str, Any] = {
        "admin": True, "is_admin": True, "scope": "admin", "scp": ["strongroom:admin"], "key_id": "admin",
        "permissions": ["strongroom:admin", "*"], "actor": "system", "user_id": "root", "token": {"admin": True},
        "groups": ["boss"], "https://strongroom/admin": True,
    }  # fmt: skip
    async with signing_in() as (served, issuer, _):
        plain, hostile = issuer.token(roles=["reader"]), issuer.token(roles=["reader"], **everything)
        for method, path, body in (
            ("GET", "/v1/keys", None), ("POST", "/v1/keys", {"name": "n"}), ("GET", "/v1/webhooks", None),
            ("GET", "/v1/audit?tenant=globex", None), ("GET", "/v1/tenants/globex/policies", None),
            ("GET", "/v1/keys/admin", None), ("DELETE", "/v1/keys/admin", None), ("GET", "/v1/leaks/policy/*", None),
        ):  # fmt: skip
            assert (await served.call(method, path, body, key=hostile)).status == (
                await served.call(method, path, body, key=plain)
            ).status, path
        for tenant in ("*", "", " ", None, ["acme"], {"id": "acme"}):
            answer = await served.get("/v1/keys", key=issuer.token(roles=["boss"], tenant=tenant, **everything))
            assert answer.status == 401, tenant


async def test_no_route_lets_an_administrators_token_into_another_tenant() -> None:
    async with signing_in() as (served, issuer, _):
        globex = served.room.tenant("globex")
        await globex.create(Role(id="theirs", scopes=["admin"]))
        await served.room.tenants.create("globex")
        before = (await served.room.store.changes("end")).cursor
        tried = 0
        for path, item in openapi.document(served.app.api)["paths"].items():
            if not path.startswith("/v1/") or "{tenant}" not in path:
                continue
            for method in item:
                there = re.sub(r"\{[^}]*\}", "theirs", path.replace("{tenant}", "globex"))
                answer = await served.call(method.upper(), there, {}, key=issuer.token(roles=["boss", "theirs"]))
                assert answer.status >= 400, (method, there, answer)
                tried += 1
        assert tried > 30
        records = (await served.room.store.changes(before)).records
        assert {record.action for record in records if record.actor == "user:ann"} <= {"deny"}


async def test_hostile_tokens_are_answered_401_and_leave_nothing_in_memory() -> None:
    async with signing_in() as (served, issuer, _):
        assert (await served.get("/v1/keys", key=issuer.token(roles=["reader"]))).status == 200
        authenticator = served.app.services.authenticator
        kept = len(authenticator._long)
        before = (await served.room.store.changes("end")).cursor
        other = key_of("RS256", "k2")
        content = claims(roles=["boss"])
        pem: bytes = issuer.key.as_pem(private=False)  # type: ignore[union-attr]
        for token in (
            signed({"alg": "none"}, content, None), signed({"alg": "HS256", "kid": "k1"}, content, pem),
            signed({"alg": "RS256", "kid": "k1"}, content, other), issuer.token(iss="https://evil.example"),
            issuer.token(aud="other"), issuer.token(header={"kid": "../../etc/passwd"}),
            issuer.token(header={"kid": "' OR 1=1; --"}), issuer.token(header={"kid": "k" * 10_240}),
            issuer.token(exp=int(time.time()) - 61), issuer.token(nbf=int(time.time()) + 90),
            issuer.token(header={"crit": ["x"]}), issuer.token(header={"cty": "JWT"}),
            issuer.token(key=other, header={"kid": "k1", "jwk": public(other), "jku": issuer.url}),
            issuer.token(more="x" * MAX_TOKEN_BYTES), signed({"alg": "RS256"}, b"{" * 100, issuer.key),
        ):  # fmt: skip
            for path in ("/v1/keys", "/v1/tenants/acme/policies", "/v1/audit"):
                answer = await served.get(path, key=token)
                assert answer.status == 401, answer
                assert 'error="invalid_token"' in answer.headers["www-authenticate"]
            assert (await served.verify("x", key=token)).status == 401
            assert (await served.get("/readyz", key=token)).status == 200
        assert len(authenticator._long) == kept
        assert (await served.room.store.changes("end")).cursor == before


async def test_without_the_settings_a_token_is_answered_with_a_sentence() -> None:
    async with serving() as served:
        answer = await served.get("/v1/keys", key=Issuer().token())
        assert answer.status == 401
        assert "accepts no JWTs: STRONGROOM_JWT_ISSUER" in answer.json["detail"]


# --- How soon -------------------------------------------------------------------------------------------------


async def _until(served: Served, token: str, status: int, path: str = "/v1/keys") -> float:
    """Seconds until the token's call is answered with this status."""
    began = time.monotonic()

    async def answered() -> bool:
        return (await served.get(path, key=token)).status == status

    await wait_until(answered)
    return time.monotonic() - began


@pytest.mark.parametrize("backend", ["sqlite", "postgres", "firestore"], indirect=True)
async def test_changes_of_another_node_to_roles_and_users_act_within_a_second(url: str) -> None:
    async with signing_in(url) as (served, issuer, _), serving(url) as other:
        elsewhere = other.room.tenant("acme")
        token = issuer.token(roles=["reader"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        took = []
        await elsewhere.update(Role, "reader", {"scopes": []})
        took.append(await _until(served, token, 403))
        await elsewhere.update(Role, "reader", {"scopes": ["read"]})
        took.append(await _until(served, token, 200))
        await elsewhere.delete(Role, "reader")
        took.append(await _until(served, token, 403))
        await elsewhere.create(User(id="u1", email="ann@acme.example", external_subject="ann", roles=["writer"]))
        took.append(await _until(served, token, 200))
        await elsewhere.update(User, "u1", {"status": "suspended"})
        took.append(await _until(served, token, 401))
        await elsewhere.update(User, "u1", {"status": "active"})
        took.append(await _until(served, token, 200))
        assert max(took) < WITHIN_S + PATIENCE_S / 10, took  # a busy machine may be slower
        assert min(took) < WITHIN_S, took


async def test_a_node_whose_change_feed_is_broken_sees_a_changed_role_within_a_second(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with signing_in(url) as (served, issuer, _), serving(url) as other:
        token = issuer.token(roles=["reader"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        await served.room.feed.close()
        await other.room.tenant("acme").update(Role, "reader", {"scopes": []})
        assert await _until(served, token, 403) < WITHIN_S + PATIENCE_S / 10  # a busy machine may be slower


async def test_a_changed_role_ends_cached_callers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "TRUSTED_FOR_S", 3_600.0)  # so that only the change itself can end them
    async with signing_in() as (served, issuer, acme):
        token = issuer.token(roles=["reader"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        await acme.update(Role, "reader", {"scopes": []})
        await _until(served, token, 403)
        await acme.create(User(id="u1", email="ann@acme.example", external_subject="ann", roles=["reader", "writer"]))
        await _until(served, token, 200)


async def test_a_suspended_user_is_told_why() -> None:
    async with signing_in() as (served, issuer, acme):
        await acme.create(User(id="u1", email="a@acme.example", external_subject="ann", status="suspended"))
        await acme.create(ServiceAccount(id="s1", name="n", external_subject="robot", status="disabled"))
        for subject, sentence in (("ann", "the user 'u1' is suspended"), ("robot", "the user 's1' is disabled")):
            answer = await served.get("/v1/keys", key=issuer.token(sub=subject, roles=["boss"]))
            assert (answer.status, answer.json["detail"]) == (401, sentence)


async def test_tokens_of_a_suspended_tenant_are_refused_with_its_reason_until_it_is_resumed() -> None:
    async with signing_in() as (served, issuer, _):
        token = issuer.token(roles=["boss"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        await served.room.tenants.suspend("acme", "invoice 17 is unpaid")
        assert await _until(served, token, 403) < PATIENCE_S
        refused = await served.get("/v1/audit", key=token)
        assert (refused.status, refused.code) == (403, "tenant_suspended")
        assert "invoice 17 is unpaid" in refused.json["detail"]
        await served.room.tenants.resume("acme")
        await _until(served, token, 200)


async def test_a_cached_caller_stops_when_its_token_expires() -> None:
    async with signing_in(leeway_s=0) as (served, issuer, _):
        token = issuer.token(roles=["reader"], exp=int(time.time()) + 2)
        assert (await served.get("/v1/keys", key=token)).status == 200
        await _until(served, token, 401)
        assert time.time() >= int(time.time())
        answer = await served.get("/v1/keys", key=token)
        assert answer.json["detail"] == "the token has expired"


async def test_a_quiet_stream_ends_within_a_second_of_its_tokens_expiry() -> None:
    async with signing_in(leeway_s=0) as (served, issuer, _):
        expires = int(time.time()) + 2
        token = issuer.token(roles=["reader"], exp=expires)
        async with Stream(served.app, "/v1/tenants/acme/policies:watch", token) as stream:
            assert stream.status == 200
            ready = await stream.event()
            assert ready is not None
            assert await stream.event() is None
            assert expires <= time.time() < expires + WITHIN_S + PATIENCE_S / 10  # a busy machine may be slower


async def test_a_withdrawn_key_of_the_issuer_stops_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async with signing_in() as (served, issuer, _):
        token = issuer.token(roles=["reader"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        issuer.keys = [public(key_of("RS256", "k2"))]
        assert served.room.sign_in is not None
        await served.room.sign_in._jwks.read()
        assert await _until(served, token, 401) < PATIENCE_S
        fresh = issuer.token(key=key_of("RS256", "k2"), roles=["reader"])
        assert (await served.get("/v1/keys", key=fresh)).status == 200


async def test_the_cached_callers_of_tokens_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auth, "MAX_LONG_BYTES", 10_000)
    async with signing_in() as (served, issuer, _):
        tokens = [issuer.token(roles=["reader"], jti=str(number)) for number in range(30)]
        for token in tokens * 2:
            assert (await served.get("/v1/keys", key=token)).status == 200
        authenticator = served.app.services.authenticator
        assert authenticator._long_bytes == sum(len(caller.header) for caller in authenticator._long.values())
        assert 5_000 < authenticator._long_bytes <= 10_000


async def test_two_headers_with_the_same_end_are_two_callers() -> None:
    async with signing_in() as (served, issuer, _):
        token = issuer.token(roles=["reader"])
        assert (await served.get("/v1/keys", key=token)).status == 200
        head, body, end = token.split(".")
        forged = f"{head}.{body[:-4]}AAAA.{end}"
        assert (await served.get("/v1/keys", key=forged)).status == 401
        assert (await served.get("/v1/keys", key=token)).status == 200


# --- The issuer is away ---------------------------------------------------------------------------------------


async def test_while_the_issuer_never_answers_tokens_get_503_and_keys_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "TIMEOUT_S", 0.3)
    async with issuing() as issuer:
        issuer.silent = True
        async with serving(sign_in=issuer.settings()) as served:
            async with asyncio.timeout(PATIENCE_S):
                answers = await asyncio.gather(
                    *(served.get("/v1/keys", key=issuer.token(jti=str(n))) for n in range(20))
                )
            assert {answer.status for answer in answers} == {503}
            assert "keys of the token issuer cannot be read" in answers[0].json["detail"]
            assert (await served.get("/v1/keys")).status == 200
            ready = (await served.get("/readyz")).json
            assert (ready["status"], ready["ready"]) == ("degraded", True)
            assert "no whole answer" in ready["dependencies"]["sign_in"]["details"]["error"]
            text = (await served.client.get("/metrics")).text
            assert 'strongroom_tokens_total{result="unavailable"} 20.0' in text
            assert "strongroom_token_keys_age_seconds +Inf" in text


async def test_a_token_works_on_a_real_server(tmp_path: Path) -> None:
    async with issuing("ES256") as issuer:

        def calls() -> None:
            with running(tmp_path, **issuer.environment(STRONGROOM_JWT_ROLES_CLAIM="realm.roles")) as server:
                with server.client() as admin:
                    made = admin.put("/v1/tenants/acme/roles/editor", json={"scopes": ["write"]})
                    assert made.status_code == 201, made.text
                with server.client(issuer.token(realm={"roles": ["editor"]})) as ann:
                    deadline = time.monotonic() + PATIENCE_S
                    while (made := ann.post("/v1/keys", json={"name": "n"})).status_code == 403:
                        assert time.monotonic() < deadline
                    assert (made.status_code, made.json()["tenant"]) == (201, "acme")
                    for _ in range(3):  # on the direct path
                        checked = ann.post("/v1/keys/verify", json={"key": made.json()["key"]})
                        assert checked.json()["code"] == "VALID"
                with server.client(issuer.token(realm={"roles": ["editor"]}, exp=1)) as late:
                    refused = late.get("/v1/keys")
                    assert (refused.status_code, refused.json()["detail"]) == (401, "the token has expired")
                ready = httpx.get(f"http://127.0.0.1:{server.port}/readyz", timeout=PATIENCE_S).json()
                assert ready["dependencies"]["sign_in"]["status"] == "ok"
                assert server.stop()[0] == 0

        await asyncio.to_thread(calls)
