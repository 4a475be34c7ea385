"""The permission `strongroom:auditor`: it reads and verifies the audit trail, and opens nothing else."""

from __future__ import annotations

import re

import pytest

from strongroom.keys import AUDITOR
from strongroom.server import openapi
from tests.helpers.server_app import Served, serving

_PARAMETER = re.compile(r"\{[^}]*\}")


def _closed_to_auditors(served: Served) -> list[tuple[str, str]]:
    """Every operation of the document that is neither open nor a read of the audit trail."""
    return [
        (method.upper(), _PARAMETER.sub("x", path))
        for path, item in openapi.document(served.app.api)["paths"].items()
        for method in item
        if path.startswith("/v1/") and not (method == "get" and (path == "/v1/audit" or path.startswith("/v1/audit/")))
    ]


@pytest.mark.parametrize("tenant", ["*", "acme"])
async def test_an_auditor_reads_the_audit_trail_and_every_other_route_answers_403(tenant: str) -> None:
    async with serving() as served:
        auditor = await served.manager("auditor", tenant)
        assert (await served.get("/v1/audit", key=auditor)).status == 200
        assert (await served.call("HEAD", "/v1/audit", key=auditor)).status == 200
        room = served.room
        before = (await room.store.changes("end")).cursor
        closed = _closed_to_auditors(served)
        assert len(closed) > 40
        for method, path in closed:
            answer = await served.call(method, path, b"{}", key=auditor)
            assert answer.status == 403, (method, path, answer)
            assert AUDITOR in answer.json["detail"]
        written = (await room.store.changes(before)).records
        assert {record.action for record in written} <= {"deny", "seal"}, "a refused call changed something"
        for path in ("/v1", "/v1/nothing", "/v1/auditors", "/v1/audit%2F..%2Fkeys"):
            assert (await served.get(path, key=auditor)).status == 403, path
        details = [
            one.get("details") for one in (await served.get("/readyz", key=auditor)).json["dependencies"].values()
        ]
        assert not any(details), "an auditor reads the details of the health check"


async def test_an_auditor_of_one_tenant_reads_only_its_records() -> None:
    async with serving() as served:
        for tenant in ("acme", "globex"):
            await served.make_key(tenant=tenant)
        auditor = await served.manager("auditor", "acme")
        everything = await served.get("/v1/audit", key=auditor)
        assert {item["tenant"] for item in everything.json["items"]} == {"acme"}
        assert (await served.get("/v1/audit?tenant=globex", key=auditor)).status == 403
        whole = await served.get("/v1/audit", key=await served.manager("auditor"))
        assert {"acme", "globex"} <= {item["tenant"] for item in whole.json["items"]}


async def test_every_audit_route_is_open_to_auditors_and_each_only_for_its_tenant() -> None:
    async with serving() as served:
        for tenant in ("acme", "globex"):
            await served.make_key(tenant=tenant)
        ours, whole = await served.manager("auditor", "acme"), await served.manager("auditor")
        audits = [
            path
            for path, item in openapi.document(served.app.api)["paths"].items()
            if path.startswith("/v1/audit/") and "get" in item
        ]
        assert len(audits) >= 4
        for path in audits:
            for tenant in ("acme", "globex"):
                query = "?index=0" if path.endswith("/proof") else ""
                there = _PARAMETER.sub("x", path.replace("{tenant}", tenant)) + query
                bound = (await served.get(there, key=ours)).status
                assert (bound == 403) == (tenant != "acme" or "{tenant}" not in path), (there, bound)
                assert (await served.get(there, key=whole)).status in (200, 404), there


async def test_a_scope_beside_auditor_keeps_what_it_allows() -> None:
    async with serving() as served:
        both = (await served.make_key(tenant="*", permissions=["strongroom:read", AUDITOR]))["key"]
        assert (await served.get("/v1/keys", key=both)).status == 200
        assert (await served.get("/v1/audit", key=both)).status == 200
        reader = await served.manager("read")
        refused = await served.get("/v1/audit", key=reader)
        assert (refused.status, AUDITOR in refused.json["detail"]) == (403, True)


async def test_only_an_administrator_makes_auditors() -> None:
    async with serving() as served:
        writer = await served.manager("write", "acme")
        body = {"name": "n", "tenant": "acme", "permissions": [AUDITOR]}
        assert (await served.post("/v1/keys", body, key=writer)).status == 403
        assert (await served.post("/v1/keys", body, key=await served.manager("admin", "acme"))).status == 201
