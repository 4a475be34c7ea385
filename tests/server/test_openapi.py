"""The OpenAPI document is exact: every answer that the tests see is checked against it (`openapi_contract`)."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterator
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from tests.helpers.server_app import TOKENS, Served, serving

JSON = dict[str, Any]
FREE_JSON = {
    # What callers keep beside their keys, and it is not ours to know.
    "NewKey.metadata", "KeyChanges.metadata", "BulkIn.changes.metadata", "KeyOut.metadata", "IssuedKeyOut.metadata",
    "VerifyOut.metadata", "ReservationOut.metadata", "StatsOut.model",
    "TenantOut.metadata", "TenantOut.settings", "NewTenant.metadata", "NewTenant.settings",
    "TenantFields.metadata", "TenantFields.settings", "TenantChanges.metadata", "TenantChanges.settings",
    # Documents as the journal has them, and what a store tells of itself.
    "ChangeEvent.before", "ChangeEvent.after", "AuditRecordOut.before", "AuditRecordOut.after", "DependencyOut.details",
}  # fmt: skip
"""Where the document promises no more than "JSON". A field of an entity that is declared as a dict is one as well."""


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as made:
        yield made


def schemas_of(value: Any, name: str) -> Iterator[tuple[str, JSON]]:
    """Every schema in a named schema, with the path of the property that it is of."""
    if not isinstance(value, dict):
        return
    yield name, value
    for key, one in value.get("properties", {}).items():
        yield from schemas_of(one, f"{name}.{key}")
    for key in ("items", "additionalProperties", "contains"):
        yield from schemas_of(value.get(key), name)
    for key in ("anyOf", "oneOf", "prefixItems") if "properties" not in value else ():
        for one in value.get(key, ()):
            yield from schemas_of(one, name)


def is_loose(schema: JSON) -> bool:
    if not {"type", "$ref", "enum", "const", "anyOf", "oneOf", "allOf"} & schema.keys():
        return True
    if schema.get("type") == "object":
        named = "properties" in schema or isinstance(schema.get("additionalProperties"), dict)
        return not named or "additionalProperties" not in schema
    return schema.get("type") == "array" and "items" not in schema


async def test_no_schema_is_looser_than_a_stated_list_of_free_json(served: Served) -> None:
    found = {
        path
        for name, schema in served.contract.document["components"]["schemas"].items()
        for path, part in schemas_of(schema, name)
        if is_loose(part)
    }
    own = {path for path in found if path.split(".")[0] not in served.room.database.registry.by_name}
    assert own == FREE_JSON
    of_entities = {path.split(".")[0] + "." + path.split(".")[-1] for path in found - own}
    declared = {
        f"{collection.name}.{field.name}"
        for collection in served.room.database.registry.collections
        for field in collection.fields.values()
        if field.type == "map"
    }
    assert of_entities <= declared


async def test_limits_and_their_windows_are_described_by_their_kind(served: Served) -> None:
    schemas = served.contract.document["components"]["schemas"]
    for suffix in ("", "In"):
        window = schemas[f"Limit{suffix}"]["properties"]["window"]
        assert window["discriminator"]["propertyName"] == "kind"
        mapped = window["discriminator"]["mapping"]
        assert mapped.keys() == {"rolling", "anchored", "calendar", "total"}
        assert [one["$ref"] for one in window["oneOf"]] == [
            mapped[kind] for kind in ("rolling", "anchored", "calendar", "total")
        ]
        for kind in mapped:
            schema = schemas[kind.title() + suffix]
            assert schema["properties"]["kind"]["const"] == kind
            assert "kind" in schema["required"]
            assert schema["additionalProperties"] is False
    assert schemas["Limit"]["required"] == ["resource", "limit", "window"]


@pytest.mark.parametrize(
    ("operation", "request_headers", "answer_headers"),
    [
        ("post /v1/keys", {"Idempotency-Key", "X-Request-Id"}, {"201": {"ETag", "Location"}}),
        ("get /v1/keys/{id}", {"If-None-Match"}, {"200": {"ETag"}, "304": {"ETag"}}),
        ("patch /v1/keys/{id}", {"If-Match", "Idempotency-Key"}, {"200": {"ETag"}}),
        ("delete /v1/keys/{id}", {"If-Match", "Idempotency-Key"}, {}),
        ("post /v1/keys/{id}/rotate", {"If-Match", "Idempotency-Key"}, {"200": {"ETag"}}),
        ("put /v1/quotas/{kind}/{tenant}/{name}", {"If-Match", "If-None-Match"}, {"200": {"ETag"}, "201": {"ETag"}}),
        ("put /v1/tenants/{tenant}/accounts/{id}", {"If-Match", "If-None-Match"}, {"200": {"ETag"}, "201": {"ETag"}}),
        ("post /v1/tenants/{tenant}/accounts", {"Idempotency-Key"}, {"201": {"ETag", "Location"}}),
        ("get /v1/tenants/{tenant}/accounts:watch", {"Last-Event-ID"}, {}),
        ("post /v1/webhooks", {"Idempotency-Key"}, {"201": {"ETag", "Location"}}),
        ("post /v1/keys/verify", {"Idempotency-Key"}, {}),
    ],
)
async def test_every_header_is_described(
    operation: str, request_headers: set[str], answer_headers: dict[str, set[str]], served: Served
) -> None:
    method, path = operation.split()
    described = served.contract.document["paths"][path][method]
    assert request_headers <= {one["name"] for one in described["parameters"] if one["in"] == "header"}
    for status, names in answer_headers.items():
        assert names <= described["responses"][status]["headers"].keys()
    if "If-Match" in request_headers:
        assert "412" in described["responses"]


async def test_each_status_lists_its_error_codes(served: Served) -> None:
    document = served.contract.document
    seen = set()
    for item in document["paths"].values():
        for operation in item.values():
            for status, answer in operation["responses"].items():
                if "$ref" in answer:
                    failure = document["components"]["responses"][answer["$ref"].rpartition("/")[2]]
                    (media,) = failure["content"].values()
                    assert media["schema"]["properties"]["status"] == {"const": int(status)}
                    seen |= set(media["schema"]["properties"]["code"]["enum"])
                    assert ("Retry-After" in failure["headers"]) == (status in ("429", "503", "507"))
    never_of_an_operation = {"method_not_allowed", "bound_exceeded"}
    assert seen == set(document["components"]["schemas"]["ProblemDetails"]["properties"]["code"]["enum"]) - (
        never_of_an_operation
    )


async def test_a_response_that_contradicts_the_document_fails_its_test(served: Served) -> None:
    made = await served.make_key(limits=[TOKENS])
    answer = (await served.get(f"/v1/keys/{made['id']}")).answer
    good = dict(answer.headers), answer.json()

    def differs(change: Any, status: int = 200) -> None:
        headers, body = copy.deepcopy(good)
        change(headers, body)
        with pytest.raises(AssertionError):
            served.contract.check("GET", "/v1/keys/x", status, headers, msgspec.json.encode(body))

    served.contract.check("GET", "/v1/keys/x", 200, good[0], msgspec.json.encode(good[1]))
    differs(lambda headers, body: body.update(more=1))
    differs(lambda headers, body: body.pop("unclaimed"))
    differs(lambda headers, body: body.update(created_at="yesterday"))
    differs(lambda headers, body: body["limits"][0].update(more=1))
    differs(lambda headers, body: body["limits"][0]["window"].pop("kind"))
    differs(lambda headers, body: body["limits"][0]["window"].update(seconds="1"))
    differs(lambda headers, body: headers.pop("etag"))
    differs(lambda headers, body: headers.update({"retry-after": "1"}))
    differs(lambda headers, body: headers.update({"content-type": "text/html"}))
    differs(lambda headers, body: None, status=202)
    with pytest.raises(AssertionError):
        served.contract.check("GET", "/v1/secrets", 200, good[0], msgspec.json.encode(good[1]))
    with pytest.raises(AssertionError, match="no parameter 'colour'"):
        served.contract.check_request("GET", "/v1/keys", "colour=red", b"")
    with pytest.raises(AssertionError, match="not as the document says"):
        served.contract.check_request("POST", "/v1/keys", "", b'{"name": "a", "limits": [{"resource": "tokens"}]}')


async def test_a_refill_is_described_as_exactly_as_its_limit() -> None:
    async with serving() as served:
        spec = (await served.get("/openapi.json")).json
        limit = jsonschema_rs.Draft202012Validator(
            {"$ref": "#/components/schemas/LimitIn", "components": spec["components"]}
        )
        for resource, amount, fits in (
            ("cost", 1.5, True), ("cost", 10**9 + 1, False), ("tokens", 1.5, False), ("tokens", 10**9 + 1, True),
        ):  # fmt: skip
            refill = {"amount": amount, "seconds": 60}
            given = {"resource": resource, "limit": 10, "window": {"kind": "total", "refill": refill}}
            assert limit.is_valid(given) is fits, given
            made = await served.post("/v1/keys", {"name": "k", "tenant": "acme", "limits": [given]})
            assert (made.status == 201) is fits, made.json
