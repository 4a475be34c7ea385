"""`:watch`: a collection's changes as server-sent events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.rules import Decision, Request, default_policy
from strongroom.server import adminkey, watch
from strongroom.server.app import Bounds, build
from strongroom.state import ENTITIES
from tests.serving import ADMIN, Stream, serving

PATH = "/v1/tenants/acme/policies"
POLICY = {"policy_type": "t", "policy_name": "n"}


async def test_each_change_is_delivered_in_order_with_what_changed() -> None:
    async with serving() as served, Stream(served.app, f"{PATH}:watch") as stream:
        ready = await stream.event()
        assert ready is not None
        assert (ready["event"], json.loads(ready["data"])) == ("ready", {"cursor": ready["id"]})
        made = (await served.post(PATH, {**POLICY, "id": "p"}, X_Request_Id="r1")).json
        await served.post("/v1/tenants/acme/actions", {"action_type": "a", "source_service": "s"})
        await served.call("PUT", "/v1/tenants/other/policies/q", POLICY)
        await served.call("PATCH", f"{PATH}/p", {"enabled": False})
        await served.call("DELETE", f"{PATH}/p")
        seen: list[dict[str, Any]] = []
        while len(seen) < 3:
            event = await stream.event()
            assert event is not None
            if "data" in event:
                seen.append({"event": event["event"], **json.loads(event["data"])})
        assert [(e["event"], e["action"], e["id"]) for e in seen] == [
            (a, a, "p") for a in ("create", "update", "delete")
        ]
        assert (seen[0]["version"], seen[0]["actor"], seen[0]["request_id"]) == (made["version"], "key:admin", "r1")
        assert seen[0]["after"] == {**POLICY, "rules": {}, "enabled": True}
        assert (seen[1]["before"], seen[1]["after"]) == ({"enabled": True}, {"enabled": False})


async def test_a_stream_goes_on_where_the_last_one_ended() -> None:
    async with serving() as served:
        async with Stream(served.app, f"{PATH}:watch") as stream:
            ready = await stream.event()
            assert ready is not None
        for number in range(5):
            await served.call("PUT", f"{PATH}/p{number}", POLICY)
        for headers, query in (({"Last_Event_ID": ready["id"]}, ""), ({}, f"?cursor={ready['id']}")):
            async with Stream(served.app, f"{PATH}:watch{query}", **headers) as again:
                first = await again.event()
                assert first is not None
                assert (first["event"], first["id"]) == ("ready", ready["id"])
                seen = [json.loads((await again.event() or {})["data"])["id"] for _ in range(5)]
                assert seen == [f"p{n}" for n in range(5)]


async def test_a_secret_is_masked_in_a_stream() -> None:
    async with serving() as served, Stream(served.app, "/v1/tenants/acme/accounts:watch") as stream:
        await stream.event()
        await served.post("/v1/tenants/acme/accounts", {"owner": "o", "token": "hunter2"})
        event = await stream.event()
        assert event is not None
        assert json.loads(event["data"])["after"]["token"] == "***"


async def test_a_caller_that_may_no_longer_read_gets_nothing_more() -> None:
    for act in ("disable", "demote", "delete"):
        async with serving() as served:
            made = await served.make_key(tenant="acme", permissions=["strongroom:read"])
            async with Stream(served.app, f"{PATH}:watch", made["key"]) as stream:
                await stream.event()
                path = f"/v1/keys/{made['id']}"
                if act == "disable":
                    await served.post(f"{path}/disable")
                elif act == "demote":
                    await served.call("PATCH", path, {"permissions": []})
                else:
                    await served.call("DELETE", path)
                await served.post(PATH, POLICY)
                events = []
                while (event := await stream.event()) is not None:
                    events.append(event)
                assert not any("data" in event for event in events), act


async def test_the_rules_are_asked_again_before_each_delivery_and_their_no_is_not_journalled() -> None:
    hidden: set[str] = set()

    def policy(request: Request) -> Decision:
        if request.operation == "get" and (request.before or {}).get("policy_name") in hidden:
            return Decision(False, "hidden")
        return default_policy(request)

    async with Strongroom.open("json://:memory:", entities=ENTITIES, policy=policy) as room:
        await adminkey.ensure(room, ADMIN)
        app = build(room)
        acme = room.tenant("acme")
        async with Stream(app, f"{PATH}:watch") as stream:
            await stream.event()
            policies = [await acme.create(ENTITIES[0].parse({**POLICY, "policy_name": name})) for name in ("a", "b")]
            hidden.add("b")
            policies.append(await acme.create(ENTITIES[0].parse({**POLICY, "policy_name": "b"})))
            await acme.create(ENTITIES[0].parse({**POLICY, "policy_name": "c"}))
            names = []
            while "c" not in names:
                event = await stream.event()
                assert event is not None
                if "data" in event:
                    names.append(json.loads(event["data"])["after"]["policy_name"])
            assert names.count("b") <= 1, "delivered although the rules had said no by then"
        records = (await room.store.changes(None, tenant="acme")).records
        assert [r for r in records if r.action == "deny"] == []


async def test_what_is_wrong_with_a_stream_is_answered_before_it_begins() -> None:
    async with serving() as served:
        assert (await served.get(f"{PATH}:watch", Last_Event_ID="nonsense")).paths == ["cursor"]
        assert (await served.get(f"{PATH}:watch?colour=red")).paths == ["colour"]
        assert (await served.get("/v1/tenants/acme/nothing:watch")).status == 404
        assert (await served.post(f"{PATH}:watch", {})).status in (404, 405)
        assert served.app.services.watchers == 0


async def test_more_streams_than_the_bound_are_told_to_come_back_and_closed_ones_make_room() -> None:
    async with serving(bounds=Bounds(max_watchers=2)) as served:
        async with Stream(served.app, f"{PATH}:watch") as one, Stream(served.app, f"{PATH}:watch") as two:
            assert (one.status, two.status) == (200, 200)
            refused = await served.get(f"{PATH}:watch")
            assert (refused.status, refused.code) == (429, "too_many_requests")
        assert served.app.services.watchers == 0
        async with Stream(served.app, f"{PATH}:watch") as again:
            assert again.status == 200


async def test_streams_end_when_the_server_stops() -> None:
    async with serving() as served, Stream(served.app, f"{PATH}:watch") as stream:
        await stream.event()
        served.app.services.close()
        assert await stream.event() is None
        assert (await served.get(f"{PATH}:watch")).status == 503
        ready = await served.get("/readyz")
        assert (ready.status, ready.json["status"]) == (503, "stopping")


async def test_a_quiet_stream_has_a_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "HEARTBEAT_S", 0.02)
    async with serving() as served, Stream(served.app, f"{PATH}:watch") as stream:
        ready = await stream.event()
        assert ready is not None
        for _ in range(3):
            beat = await stream.event()
            assert beat is not None
            assert beat["id"] >= ready["id"]
            assert "data" not in beat


async def test_a_reader_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "SEND_TIMEOUT_S", 0.05)
    async with serving() as served:
        stream = Stream(served.app, f"{PATH}:watch")

        class Full(asyncio.Queue[Any]):
            async def put(self, item: Any) -> None:
                if item.get("body"):
                    await asyncio.Event().wait()
                await super().put(item)

        stream._sent = Full()
        async with stream:
            assert await stream.event() is None
        assert served.app.services.watchers == 0
