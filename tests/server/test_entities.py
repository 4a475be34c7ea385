"""`/v1/tenants/{tenant}/{collection}`: documents, versions, filters, secrets."""

from __future__ import annotations

import asyncio
import json
from decimal import Decimal
from typing import Any
from urllib.parse import quote, urlencode

import pytest

from strongroom.server.filters import SUFFIXES
from strongroom.state.model import ENTITIES, Policy
from tests.helpers.server_app import Account, Served, serving

POLICY = {"policy_type": "rate", "policy_name": "default", "rules": {"deep": [1, 0.5, None, {"x": "y"}]}}
PATH = "/v1/tenants/acme/policies"
ACCOUNTS = "/v1/tenants/acme/accounts"


async def test_a_document_is_created_read_replaced_changed_and_removed() -> None:
    async with serving() as served:
        made = await served.post(PATH, POLICY)
        assert made.status == 201
        assert {name: made.json[name] for name in POLICY} == json.loads(json.dumps(POLICY), parse_float=Decimal)
        assert made.json["enabled"] is True
        one = f"{PATH}/{made.json['id']}"
        read = await served.get(one)
        assert read.json == made.json
        assert read.headers["etag"] == f'"{made.json["version"]}"'
        assert (await served.get(one, If_None_Match=read.headers["etag"])).status == 304
        changed = await served.call("PATCH", one, {"enabled": False}, If_Match=read.headers["etag"])
        assert (changed.status, changed.json["enabled"], changed.json["rules"]) == (200, False, made.json["rules"])
        assert changed.json["created_at"] == made.json["created_at"]
        replaced = await served.call("PUT", one, {"policy_type": "t", "policy_name": "n"})
        assert (replaced.status, replaced.json["rules"], replaced.json["enabled"]) == (200, {}, True)
        assert (await served.call("DELETE", one)).status == 204
        for method, body in (("GET", None), ("DELETE", None), ("PATCH", {"enabled": True})):
            assert (await served.call(method, one, body)).status == 404
        assert (await served.call("PUT", one, POLICY)).status == 201


async def test_each_of_seed_002s_collections_is_served() -> None:
    bodies: dict[str, dict[str, Any]] = {
        "policies": POLICY,
        "signals": {"signal_type": "s", "timestamp_ns": 1_700_000_000_000_000_000, "payload": "aGk=", "priority": -3},
        "actions": {"action_type": "a", "source_service": "billing", "parameters": {"a": 1}},
        "coordination_status": {"id": "billing", "service_name": "billing", "status": "healthy", "timestamp_ns": 1},
    }
    assert set(bodies) == {cls.__collection__.name for cls in ENTITIES}
    async with serving() as served:
        for collection, body in bodies.items():
            made = await served.post(f"/v1/tenants/acme/{collection}", body)
            assert made.status == 201, made
            assert {name: made.json[name] for name in body} == json.loads(json.dumps(body), parse_float=Decimal)
            (found,) = (await served.get(f"/v1/tenants/acme/{collection}")).json["items"]
            assert found == made.json
            wrong = await served.post(
                f"/v1/tenants/acme/{collection}", {**body, "version": 5, "status": "?", "colour": 1}
            )
            assert {"version", "colour"} <= set(wrong.paths)


@pytest.mark.parametrize("match", ['"1"', '"0"', '"x"', 'W/"1"', '"1", "2"', '"-5"', '"99999999999999999999999"'])
async def test_another_version_than_if_match_names_is_refused(match: str) -> None:
    async with serving() as served:
        made = (await served.post(PATH, POLICY)).json
        for method, body in (("PUT", POLICY), ("PATCH", {"enabled": False}), ("DELETE", None)):
            answer = await served.call(method, f"{PATH}/{made['id']}", body, If_Match=match)
            assert (answer.status, answer.code) == (412, "precondition_failed"), answer
            assert (await served.get(f"{PATH}/{made['id']}")).json == made
            absent = await served.call(method, f"{PATH}/absent", body, If_Match=match)
            assert absent.status in (412, 404), absent
            assert (await served.get(f"{PATH}/absent")).status == 404, "If-Match created a document"


async def test_if_match_star_demands_a_document_and_if_none_match_star_none() -> None:
    async with serving() as served:
        path = f"{PATH}/p"
        assert (await served.call("PUT", path, POLICY, If_Match="*")).status == 412
        assert (await served.call("DELETE", path, If_Match="*")).status == 412
        assert (await served.call("PUT", path, POLICY, If_None_Match="*")).status == 201
        assert (await served.call("PUT", path, POLICY, If_None_Match="*")).status == 412
        assert (await served.call("PUT", path, POLICY, If_Match="*")).status == 200
        version = (await served.get(path)).headers["etag"]
        assert (await served.call("PATCH", path, {"enabled": True}, If_Match=f'"5", {version}')).status == 200
        for headers in ({"If_Match": "*", "If_None_Match": "*"}, {"If_None_Match": '"5"'}, {"If_Match": "5"}):
            assert (await served.call("PUT", path, POLICY, **headers)).status == 422, headers


async def test_if_match_star_does_not_create_a_document_that_was_just_removed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving() as served:
        store = served.room.store
        for method, body in (("PUT", POLICY), ("PATCH", {"enabled": False}), ("DELETE", None)):
            await served.call("PUT", f"{PATH}/p", POLICY)
            read = store.get

            async def read_then_remove(collection: str, tenant: str | None, id: str, read: Any = read) -> Any:
                found = await read(collection, tenant, id)
                if (collection, id) == ("policies", "p"):
                    monkeypatch.undo()
                    await served.room.tenant("acme").delete(Policy, "p")
                return found

            monkeypatch.setattr(store, "get", read_then_remove)
            answer = await served.call(method, f"{PATH}/p", body, If_Match="*")
            monkeypatch.undo()
            assert (answer.status, answer.code) == (412, "precondition_failed"), method
            assert (await served.get(f"{PATH}/p")).status == 404, method


async def test_if_match_star_accepts_any_version() -> None:
    async with serving() as served:
        await served.call("PUT", f"{PATH}/p", POLICY)
        puts = [served.call("PUT", f"{PATH}/p", {**POLICY, "rules": {"n": n}}, If_Match="*") for n in range(5)]
        assert {answer.status for answer in await asyncio.gather(*puts)} == {200}


async def test_a_taken_id_is_refused_with_409() -> None:
    async with serving() as served:
        assert (await served.post(PATH, {**POLICY, "id": "p"})).status == 201
        answer = await served.post(PATH, {**POLICY, "id": "p"})
        assert (answer.status, answer.code) == (409, "already_exists")


async def test_every_problem_of_a_document_is_reported_at_once() -> None:
    wrong = {"id": "other", "version": 1, "created_at": "2030-01-01T00:00:00Z", "owner": 5, "seats": "3", "rate": "x",
             "tags": "a", "address": {"street": "s", "number": "5", "zip": 1}, "photo": "???", "until": "2030-01-01",
             "x": 1,
             "token": "***", "balance": True}  # fmt: skip
    async with serving() as served:
        for method, path in (("PUT", f"{ACCOUNTS}/a"), ("POST", ACCOUNTS), ("PATCH", f"{ACCOUNTS}/a")):
            answer = await served.call(method, path, wrong)
            named = {path.split(".")[0] for path in answer.paths}
            assert answer.status == 422
            assert named == set(wrong) - ({"id"} if method == "POST" else set()), (method, set(wrong) - named, answer)
        for body, status in (
            (b"", 400),
            (b"[]", 422),
            (b"{", 400),
            (b'{"rate": NaN}', 422),
            (b'{"owner": "\\ud800"}', 422),
        ):
            answer = await served.post(ACCOUNTS, body)
            assert answer.status == status, (body, answer)
        naive = await served.post(ACCOUNTS, {"owner": "o", "until": "2030-01-01T00:00:00"})
        assert naive.paths == ["until"], "a time without a zone"


async def test_values_are_returned_as_they_were_sent() -> None:
    async with serving() as served:
        body = (
            b'{"owner": "o", "balance": 12345678901234567890.123456789, "photo": "_-8=", "seats": 9007199254740993,'
            b' "rate": 2, "address": {"street": "s", "number": 5}, "tags": ["a"], "until": "2037-01-01T02:00:00+02:00"}'
        )
        made = (await served.post(ACCOUNTS, body)).json
        assert made["balance"] == "12345678901234567890.123456789", "as text, so that no client rounds it"
        assert (made["photo"], made["seats"], made["rate"]) == ("/+8=", 9007199254740993, Decimal("2.0"))
        assert (made["address"], made["until"]) == ({"street": "s", "number": 5}, "2037-01-01T00:00:00Z")
        sent_back = {k: v for k, v in made.items() if k not in ("version", "created_at", "updated_at")}
        again = await served.call("PUT", f"{ACCOUNTS}/{made['id']}", json.dumps(sent_back, default=float).encode())
        assert {**again.json, "version": 0, "updated_at": 0} == {**made, "version": 0, "updated_at": 0}


async def test_a_secret_is_never_answered_in_clear_and_its_mask_is_not_stored() -> None:
    async with serving() as served:
        made = await served.post(ACCOUNTS, {"owner": "o", "token": "hunter2"})
        one = f"{ACCOUNTS}/{made.json['id']}"
        answers = [
            made,
            await served.get(one),
            await served.get(ACCOUNTS),
            await served.call("PATCH", one, {"owner": "p"}),
        ]
        answers.append(await served.call("PUT", f"{ACCOUNTS}/x", {"owner": "o", "token": "hunter2"}))
        for answer in answers:
            assert '"token":"***"' in answer.answer.text
            assert "hunter2" not in answer.answer.text
        for method in ("PUT", "PATCH"):
            assert (await served.call(method, one, {"owner": "o", "token": "***"})).paths == ["token"]
        assert (await served.room.tenant("acme").get(Account, made.json["id"])).token == "hunter2"
        assert (await served.call("PATCH", one, {"token": None})).json["token"] is None
        for query in ("token=hunter2", "order_by=token", "token__null=true"):
            assert (await served.get(f"{ACCOUNTS}?{query}")).status == 422, "found by its secret"


async def test_an_expired_document_is_not_found() -> None:
    async with serving() as served:
        await served.call("PUT", f"{ACCOUNTS}/a", {"owner": "o", "until": "2020-01-01T00:00:00Z"})
        assert (await served.get(f"{ACCOUNTS}/a")).status == 404
        assert (await served.get(ACCOUNTS)).json["items"] == []


async def test_a_retried_write_with_its_idempotency_key_happens_once() -> None:
    async with serving() as served:
        made = [await served.post(PATH, POLICY, Idempotency_Key="1") for _ in range(2)]
        assert made[0].json == made[1].json
        assert [m.status for m in made] == [201, 201]
        assert (await served.post(PATH, {**POLICY, "enabled": False}, Idempotency_Key="1")).status == 409
        path = f"{PATH}/{made[0].json['id']}"
        match = {"If_Match": made[0].headers["etag"]}
        changed = [await served.call("PATCH", path, {"enabled": False}, Idempotency_Key="2", **match) for _ in range(2)]
        assert [c.status for c in changed] == [200, 200]
        put = [await served.call("PUT", f"{PATH}/q", POLICY, Idempotency_Key="3", If_None_Match="*") for _ in range(2)]
        assert [p.status for p in put] == [201, 201]
        removed = [await served.call("DELETE", path, Idempotency_Key="4") for _ in range(2)]
        assert [r.status for r in removed] == [204, 204]


# --- Names in paths -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a/b", "a b", "ü/€", "..", "%2F", "a?b#c", "a:watch", "*", "x" * 128])
async def test_any_name_can_be_a_tenant_and_an_id(name: str) -> None:
    async with serving() as served:
        path = f"/v1/tenants/{quote(name, safe='')}/policies/{quote(name, safe='')}"
        if name == "..":
            path = path.replace("..", "%2E%2E")
        made = await served.call("PUT", path, POLICY)
        assert (made.status, made.json.get("id")) == (201, name), made
        found = await served.room.store.find("policies", name, _everything())
        assert [document["id"] for document in found] == [name]
        assert (await served.get(path)).json == made.json
        assert (await served.call("DELETE", path)).status == 204


def _everything() -> Any:
    from strongroom.entities.query import Query

    return Query().check(ENTITIES[0].__collection__)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/tenants/acme/nothing", 404), ("/v1/tenants/acme/api_keys", 404), ("/v1/tenants/acme/peppers", 404),
        ("/v1/tenants/acme/key_usage/x", 404), ("/v1/tenants/acme/policies/a%00b", 422), ("/v1/tenants//policies", 404),
        ("/v1/tenants/acme/policies/", 404), ("/v1/tenants/" + "x" * 129 + "/policies", 422), ("/v1/tenants/acme", 404),
    ],
)  # fmt: skip
async def test_missing_documents_and_collections_are_404(path: str, status: int) -> None:
    async with serving() as served:
        assert (await served.get(path)).status == status


# --- Lists ----------------------------------------------------------------------------------------------------


async def _fill(served: Served) -> None:
    for number in range(6):
        body = {
            "id": f"a{number}", "owner": "ada" if number % 2 else "bob", "balance": f"{number}.50", "seats": number,
            "rate": number / 2, "tags": ["even"] if number % 2 == 0 else ["odd", "x"], "limit": number % 3,
            "photo": "AA==" if number else "AQ==", "until": f"2037-01-0{number + 1}T00:00:00Z" if number < 4 else None,
        }  # fmt: skip
        assert (await served.post(ACCOUNTS, body)).status == 201


LISTS: list[tuple[dict[str, Any] | list[tuple[str, str]], list[int]]] = [
    ({}, [0, 1, 2, 3, 4, 5]),
    ({"owner": "ada"}, [1, 3, 5]),
    ({"owner__ne": "ada", "order_by": "-seats"}, [4, 2, 0]),
    ({"seats__ge": 2, "seats__lt": 5}, [2, 3, 4]),
    ({"seats__gt": 2, "seats__le": 4}, [3, 4]),
    ({"balance__gt": "2.50"}, [3, 4, 5]),
    ({"rate": "1"}, [2]),
    ({"limit__eq": 1}, [1, 4]),
    ({"limit": 2}, [0, 1]),
    ({"photo": "AQ=="}, [0]),
    ({"until__null": "true"}, [4, 5]),
    ({"until__null": "false", "until__le": "2037-01-02T00:00:00Z"}, [0, 1]),
    ({"until__ge": "2037-01-03T02:00:00+02:00"}, [2, 3]),
    ({"tags__contains": "x"}, [1, 3, 5]),
    ([("tags__contains_any", "x"), ("tags__contains_any", "even")], [0, 1, 2, 3, 4, 5]),
    ([("seats__in", "1"), ("seats__in", "5"), ("seats__in", "9")], [1, 5]),
    ([("id__not_in", "a0"), ("id__not_in", "a1")], [2, 3, 4, 5]),
    ({"order_by": "owner,-seats"}, [5, 3, 1, 4, 2, 0]),
    ({"where": '{"or": [{"field": "seats", "op": "==", "value": 0}, {"field": "owner", "op": "==", "value": "ada"}]}'},
     [0, 1, 3, 5]),
    ({"where": '{"and": [{"field": "until", "op": ">=", "value": "2037-01-02T00:00:00Z"},'
               '{"field": "balance", "op": "<", "value": 3.5}]}'}, [1, 2]),
    ({"where": '{"field": "seats", "op": "in", "value": [1, 2]}', "owner": "ada"}, [1]),
    ({"where": '{"field": "tags", "op": "array-contains", "value": "odd"}'}, [1, 3, 5]),
    ({"where": '{"field": "until", "op": "==", "value": null}'}, [4, 5]),
]  # fmt: skip


async def test_filters_select_the_documented_documents() -> None:
    async with serving() as served:
        await _fill(served)
        for parameters, numbers in LISTS:
            answer = await served.get(f"{ACCOUNTS}?{urlencode(parameters)}")
            assert answer.status == 200, (parameters, answer)
            assert [item["id"] for item in answer.json["items"]] == [f"a{n}" for n in numbers], parameters


async def test_a_cursor_continues_its_own_list_only() -> None:
    async with serving() as served:
        await _fill(served)
        path, found, cursor = f"{ACCOUNTS}?owner__ne=x&order_by=-owner&limit=2", [], ""
        for _ in range(3):
            page = (await served.get(path + cursor)).json
            found += [item["id"] for item in page["items"]]
            cursor = f"&cursor={page['next_cursor']}"
            if page["next_cursor"]:
                last = cursor
        assert (found, page["next_cursor"]) == (["a4", "a2", "a0", "a5", "a3", "a1"], None)
        for other in (f"{ACCOUNTS}?limit=2{last}", path.replace("acme", "other") + last, path + "&cursor=x"):
            assert (await served.get(other)).paths == ["cursor"]


async def test_every_problem_of_a_list_request_is_reported_at_once() -> None:
    wrong = [
        ("colour", "red"), ("seats", "many"), ("balance__gt", "x"), ("until__ge", "2030-01-01T00:00:00"),
        ("rate", "nan"),
        ("owner__like", "a"), ("owner", "a"), ("owner", "b"), ("until__null", "yes"), ("photo", "?"), ("limit", "0"),
        ("order_by", "colour"), ("cursor", "a"), ("cursor", "b"), ("address", "x"), ("where", '{"field": "x"}'),
    ]  # fmt: skip
    async with serving() as served:
        answer = await served.get(f"{ACCOUNTS}?{urlencode(wrong)}")
        assert answer.status == 422
        assert set(answer.paths) == {name for name, _ in wrong}, set(answer.paths) ^ {name for name, _ in wrong}


WRONG_WHERES: list[tuple[str, str]] = [
        ("5", "where"), ("{", "where"), ("[" * 10_000, "where"), ('{"and": []}', "where"), ('{"xor": []}', "where"),
        ('{"field": 5, "op": "==", "value": 1}', "where.field"),
        ('{"field": "seats", "op": "=", "value": 1}', "where.op"),
        ('{"field": "seats", "op": [], "value": 1}', "where.op"),
        ('{"field": "seats", "op": "in", "value": 1}', "where.value"),
        ('{"field": "seats", "op": "==", "value": [1]}', "where.value"),
        ('{"field": "seats", "op": "==", "value": {}}', "where.value"),
        ('{"field": "seats", "op": "==", "value": NaN}', "where"),
        ('{"field": "seats", "op": "==", "value": "1"}', "seats"),
        ('{"field": "seats", "op": "==", "value": 1.5}', "seats"),
        ('{"field": "seats", "op": "==", "value": 99999999999999999999}', "seats"),
        ('{"field": "until", "op": "<", "value": "soon"}', "where.value"),
        ('{"or": [{"field": "until", "op": "<", "value": "soon"}]}', "where.or.0.value"),
        ('{"and": [' * 12 + '{"field": "seats", "op": "==", "value": 1}' + "]}" * 12, "where" + ".and.0" * 10),
    ]  # fmt: skip


async def test_an_invalid_where_is_refused() -> None:
    async with serving() as served:
        for where, path in WRONG_WHERES:
            answer = await served.get(f"{ACCOUNTS}?{urlencode({'where': where})}")
            assert (answer.status, answer.paths) == (422, [path]), (where, answer)


def test_every_operator_has_a_suffix() -> None:
    from strongroom.entities.query import Op

    assert set(SUFFIXES.values()) == set(Op)
