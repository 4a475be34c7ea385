"""Health, readiness, metrics, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from strongroom import health
from strongroom.server.app import Bounds
from strongroom.server.errors import STATUS
from strongroom.storage.port import Health
from tests.helpers.server_app import ADMIN, TOKENS, Served, serving
from tests.helpers.waiting import PATIENCE_S, wait_until

BODILESS = (
    "/claim", "/disable", "/enable", "/redrive", "/release", "/restore", "/resume", "/test", ":rotate-pepper",
)  # fmt: skip
"""Calls that say all by their path."""


async def test_healthz_and_readyz_need_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "DEGRADED_S", PATIENCE_S)  # a busy machine is slow: that is told, and no matter here
    monkeypatch.setattr(health, "FEED_LATE_S", PATIENCE_S)
    async with serving() as served:
        assert (await served.get("/healthz", key=None)).json == {"status": "ok"}
        ready = await served.get("/readyz", key=None)
        assert (ready.status, ready.json["status"], ready.json["ready"]) == (200, "ready", True)
        store = ready.json["dependencies"]["store"]
        assert (store["status"], store["latency_ms"] >= 0) == ("ok", True)
        assert "details" not in store, "the details are not for everyone"
        assert "details" in (await served.get("/readyz")).json["dependencies"]["store"]
        assert "details" not in (await served.get("/readyz", key="unknown")).json["dependencies"]["store"]


@pytest.mark.parametrize(
    ("found", "status", "word"),
    [(Health(False, 0.1), 503, "unavailable"), (Health(True, 2.0), 200, "degraded"), (None, 503, "unavailable")],
)
async def test_readyz_names_a_dependency_that_fails_or_is_slow(
    found: Health | None, status: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CHECK_TIMEOUT_S", 0.05)

    async def check() -> Health:
        if found is None:
            await asyncio.Event().wait()
        return found or Health(False, 0)

    async with serving() as served:
        monkeypatch.setattr(served.room.store, "check", check)
        answer = await served.get("/readyz", key=None)
        assert (answer.status, answer.json["status"]) == (status, word)
        assert (await served.get("/healthz", key=None)).status == 200


async def _metrics(served: Served) -> dict[tuple[str, ...], float]:
    text = (await served.get("/metrics", key=None)).answer.text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_metrics_count_requests_by_route_verifications_by_code_and_writes() -> None:
    async with serving() as served:
        made = await served.make_key(limits=[TOKENS])
        await served.verify(made["key"], cost={"tokens": 1})
        await served.verify("unknown")
        await served.post("/v1/keys/verify:batch", {"items": [{"key": "unknown"}]})
        await served.verify("x", cost={"tokens": -1})
        for tenant in ("a", "b"):
            await served.get(f"/v1/tenants/{tenant}/policies")
        await served.get("/v1/nothing")
        found = await _metrics(served)
        assert found["strongroom_verifications_total", "VALID"] == 1
        assert found["strongroom_verifications_total", "NOT_FOUND"] == 2
        assert found["strongroom_verify_seconds_count",] == 2
        assert found["strongroom_requests_total", "POST", "/v1/keys/verify", "200"] == 2
        assert found["strongroom_request_seconds_count", "POST", "/v1/keys/verify"] == 3
        assert found["strongroom_requests_total", "POST", "/v1/keys/verify", "422"] == 1
        assert found["strongroom_requests_total", "POST", "/v1/keys", "201"] == 1
        assert found["strongroom_requests_total", "GET", "/v1/tenants/{tenant}/policies", "200"] == 2
        assert found["strongroom_requests_total", "GET", "unmatched", "404"] == 1
        assert found["strongroom_request_seconds_count", "POST", "/v1/keys"] == 1
        assert found["strongroom_writes_total", "create", "api_keys"] == 1
        assert found["strongroom_requests_in_work",] == 1, "this one"
        assert not any("acme" in part or made["id"] in part for name in found for part in name)


async def test_a_caller_that_never_sends_its_bodies_leaves_request_slots_to_others() -> None:
    async with serving(bounds=Bounds(max_concurrency=8)) as served:
        slow, other = await served.manager("write", tenant="acme"), await served.manager("write", tenant="other")
        closed = asyncio.Event()
        scope = {
            "type": "http", "method": "POST", "path": "/v1/usage", "raw_path": b"/v1/usage", "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
            "server": ("strongroom", 80), "headers": [(b"authorization", f"Bearer {slow}".encode())],
        }  # fmt: skip

        async def receive() -> Any:
            await closed.wait()
            return {"type": "http.disconnect"}

        async def send(_: Any) -> None:
            pass

        waiting = [asyncio.create_task(served.app({**scope}, receive, send)) for _ in range(20)]
        await wait_until(lambda: sum(task.done() for task in waiting) >= 13)
        refused = await served.get("/v1/keys", key=slow)
        assert (refused.status, refused.code) == (429, "too_many_requests"), refused
        assert (await served.get("/v1/keys", key=other)).status == 200
        closed.set()
        await asyncio.gather(*waiting)
        assert (await served.get("/v1/keys", key=slow)).status == 200
        assert (served.app.services.gate.inside, served.app.services.requests_of) == (0, {})


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/tenants/acme/policies", "/v1/usage:batch"])
async def test_a_client_that_disconnects_within_its_body_is_no_server_error(path: str) -> None:
    async with serving() as served:
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "root_path": "", "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
            "server": ("strongroom", 80),
            "headers": [(b"authorization", f"Bearer {ADMIN}".encode()), (b"content-length", b"100")],
        }  # fmt: skip
        messages = [{"type": "http.request", "body": b'{"na', "more_body": True}, {"type": "http.disconnect"}]

        async def receive() -> Any:
            return messages.pop(0) if len(messages) > 1 else messages[0]

        async def send(_: Any) -> None:
            pass

        await served.app(scope, receive, send)
        counted = {name[3] for name in await _metrics(served) if name[0] == "strongroom_requests_total"}
        assert counted == {"499"}


async def test_head_is_answered_wherever_get_is() -> None:
    async with serving() as served:
        made = await served.make_key()
        for path in ("/healthz", "/readyz", "/docs", "/openapi.json", "/v1/keys", f"/v1/keys/{made['id']}"):
            with_body, without = await served.get(path), await served.call("HEAD", path)
            assert (without.status, without.answer.content) == (200, b""), path
            sizes = [int(one.headers["content-length"]) for one in (without, with_body)]
            assert min(sizes) > 0
            assert sizes[0] == sizes[1] or path == "/readyz", path  # whose latencies differ
            assert without.headers["content-type"] == with_body.headers["content-type"]
        for path, status in (("/v1/nothing", 404), ("/v1/usage", 405), ("/v1/tenants/acme/policies:watch", 405)):
            answer = await served.client.head(path, headers={"Authorization": f"Bearer {ADMIN}"})
            assert (answer.status_code, answer.content) == (status, b""), path
        assert (await served.client.head("/v1/keys")).status_code == 401
        assert (await _metrics(served))["strongroom_requests_total", "HEAD", "/healthz", "200"] == 1


async def test_the_number_of_metric_series_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strongroom.server.metrics.MAX_SERIES", 20)
    async with serving() as served:
        for number in range(100):
            await served.call(f"M{number}", "/v1/keys")
        assert len(served.app.services.metrics.requests) <= 25
        assert len(served.app.services.metrics.latency) <= 25


# --- OpenAPI and the page -------------------------------------------------------------------------------------


async def _spec(served: Served) -> dict[str, Any]:
    spec: dict[str, Any] = (await served.get("/openapi.json", key=None)).answer.json()
    return spec


async def test_openapi_has_every_route_with_its_schemas() -> None:
    async with serving() as served:
        spec = await _spec(served)
        operations = {(method.upper(), path) for path, item in spec["paths"].items() for method in item}
        assert operations >= {
            ("POST", "/v1/keys"), ("GET", "/v1/keys"), ("GET", "/v1/keys/{id}"), ("PATCH", "/v1/keys/{id}"),
            ("DELETE", "/v1/keys/{id}"), ("POST", "/v1/keys/{id}/disable"), ("POST", "/v1/keys/{id}/enable"),
            ("POST", "/v1/keys/{id}/rotate"), ("GET", "/v1/keys/{id}/stats"), ("POST", "/v1/keys/verify"),
            ("POST", "/v1/keys/verify:batch"), ("POST", "/v1/usage"), ("GET", "/stats"), ("GET", "/healthz"),
            ("GET", "/readyz"), ("GET", "/metrics"),
        }  # fmt: skip
        for collection in ("policies", "signals", "actions", "coordination_status", "accounts"):
            path = f"/v1/tenants/{{tenant}}/{collection}"
            assert operations >= {("GET", path), ("POST", path), ("GET", f"{path}:watch")}
            assert operations >= {(method, f"{path}/{{id}}") for method in ("GET", "PUT", "PATCH", "DELETE")}
        ids = [operation["operationId"] for item in spec["paths"].values() for operation in item.values()]
        assert len(ids) == len(set(ids))
        for path, item in spec["paths"].items():
            for method, operation in item.items():
                assert {"400", "413", "429", "431", "500", "503"} <= operation["responses"].keys()
                assert "default" not in operation["responses"]  # nothing is answered that is not described
                assert ("401" in operation["responses"]) == (path.startswith("/v1") or path == "/stats")
                assert bool(operation.get("security")) == (path.startswith("/v1") or path in ("/stats", "/readyz"))
                if method in ("post", "put", "patch") and not path.endswith(BODILESS):
                    assert operation["requestBody"]["content"]["application/json"]["schema"], (method, path)


async def test_every_reference_of_the_openapi_document_resolves() -> None:
    async with serving() as served:
        spec = await _spec(served)
        names = set(re.findall(r'"#/components/schemas/([^"]+)"', repr(spec).replace("'", '"')))
        assert names
        assert names <= set(spec["components"]["schemas"])
        assert "$defs" not in repr(spec)


async def test_the_openapi_document_shows_no_secret_field() -> None:
    async with serving() as served:
        schemas = (await _spec(served))["components"]["schemas"]
        assert schemas["accounts.document"]["properties"]["token"]["enum"] == ["***", None]
        assert not {"hash", "sealed", "previous_hash"} & set(schemas["KeyOut"]["properties"])


async def test_the_docs_page_loads_from_this_host_only_and_explains_every_error() -> None:
    async with serving() as served:
        page = await served.get("/docs", key=None)
        assert page.headers["content-type"].startswith("text/html")
        text = page.answer.text
        assert not re.search(r'(src|href)="(https?:)?//', text)
        assert "<script" not in text
        for code in STATUS:
            assert f'id="error-{code}"' in text
            assert re.search(rf'id="error-{code}">{code}</code></td><td>\S', text), f"{code} has no explanation"
        for path in (await _spec(served))["paths"]:
            assert path in text


async def test_a_process_shows_its_leases_and_the_reservations_in_its_memory() -> None:
    async with serving(limits="leased") as served:
        made = await served.make_key(limits=[TOKENS])
        keys = served.room.keys

        async def held_in_memory() -> bool:  # once the key's own making was heard of, after which it is read again
            return ((await keys.reserve(made["key"], cost={"tokens": 1})).reservation_id or "").startswith("rsl_")

        await wait_until(held_in_memory)
        text = (await served.get("/metrics", key=None)).answer.text
        assert "\nstrongroom_limit_leases 1.0\n" in text
        assert "\nstrongroom_reservations 1.0\n" in text
    async with serving() as served:
        assert "strongroom_limit_leases" not in (await served.get("/metrics", key=None)).answer.text
