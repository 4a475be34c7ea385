"""`:watch`: a collection's changes as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from strongroom import Strongroom
from strongroom.app import Tenant
from strongroom.errors import Gone
from strongroom.journal import feed as changes
from strongroom.rules import Decision, Request, default_policy
from strongroom.server import adminkey, visible, watch
from strongroom.server.app import Bounds, build
from strongroom.state.model import ENTITIES
from tests.helpers.server_app import ADMIN, Stream, serving

PATH = "/v1/tenants/acme/policies"
POLICY = {"policy_type": "t", "policy_name": "n"}


async def test_each_change_is_delivered_in_order_with_its_fields() -> None:
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


async def test_a_stream_resumes_where_the_last_one_ended() -> None:
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


async def test_a_caller_that_loses_access_gets_nothing_more() -> None:
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


@asynccontextmanager
async def ruled(hides: Callable[[dict[str, Any]], bool]) -> AsyncIterator[tuple[Tenant, Any]]:
    """A tenant, and the server, under rules that hide documents by what they say."""

    def policy(request: Request) -> Decision:
        if request.operation == "get" and request.before is not None and hides(request.before):
            return Decision(False, "hidden")
        return default_policy(request)

    async with Strongroom.open("json://:memory:", entities=ENTITIES, policy=policy) as room:
        await adminkey.ensure(room, ADMIN)
        yield room.tenant("acme"), build(room)
        records = (await room.store.changes(None, tenant="acme")).records
        assert [r for r in records if r.action == "deny"] == [], "a delivery that is refused is not journalled"


async def told(stream: Stream, last: str) -> list[tuple[str, Any, Any]]:
    """(event, before's name, after's name) of each change until that of the document `last`."""
    found: list[tuple[str, Any, Any]] = []
    while True:
        event = await stream.event()
        assert event is not None
        if "data" not in event or event["event"] == "ready":
            continue
        data = json.loads(event["data"])
        if data["id"] == last:
            return found
        before, after = ((data.get(side) or {}).get("policy_name") for side in ("before", "after"))
        found.append((event["event"], before, after))


def named(name: str, **given: Any) -> Any:
    return ENTITIES[0].parse({**POLICY, "policy_name": name, **given})


def is_secret(document: dict[str, Any]) -> bool:
    return "secret" in document["policy_name"]


STORY = ["secret 1", "secret 2", "open 1", "open 2", "secret 3", "open 3"]
HEARD = [
    ("update", None, "open 1"),  # it has come into sight: all of it, and nothing of what it was
    ("update", "open 1", "open 2"),
    ("removed", None, None),
    ("update", None, "open 3"),
]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("end", [None, "deleted", "secret"])
async def test_a_stream_sends_nothing_of_a_document_that_the_rules_hide(end: str | None, later: bool) -> None:
    """As it happens, and to a reader that comes back later, when the document says something else."""
    async with ruled(is_secret) as (acme, app), AsyncExitStack() as stack:
        stream = Stream(app, f"{PATH}:watch")
        if not later:
            await stack.enter_async_context(stream)
            cursor = (await stream.event() or {})["id"]
        else:
            async with Stream(app, f"{PATH}:watch") as early:
                cursor = (await early.event() or {})["id"]
        heard: list[tuple[str, Any, Any]] = []
        for number, name in enumerate(STORY):
            await acme.replace(named(name, id="p"))
            if not later:
                await acme.create(named("mark", id=f"mark-{number}"))
                heard += await told(stream, f"mark-{number}")
        if end == "deleted":
            await acme.delete(ENTITIES[0], "p")
        elif end == "secret":
            await acme.update(ENTITIES[0], "p", {"policy_name": "secret 4"})
        await acme.create(named("mark", id="last"))
        if later:
            stream = await stack.enter_async_context(Stream(app, f"{PATH}:watch?cursor={cursor}"))
        heard += await told(stream, "last")
        if end == "deleted":
            assert heard == [*HEARD, ("delete", "open 3", None)]
        elif end == "secret" and later:
            # the reader may not see the document now, so no old text of it is told either: only that it left
            assert heard == [("removed", None, None), ("removed", None, None)]
        elif end == "secret":
            assert heard == [*HEARD, ("removed", None, None)]
        else:
            assert heard == HEARD


async def test_rules_may_depend_on_unchanged_fields() -> None:
    async with ruled(lambda document: not document["enabled"]) as (acme, app):
        async with Stream(app, f"{PATH}:watch") as early:
            cursor = (await early.event() or {})["id"]
        await acme.create(named("hidden", id="p", enabled=False))
        await acme.update(ENTITIES[0], "p", {"policy_name": "hidden too"})
        await acme.update(ENTITIES[0], "p", {"enabled": True})
        await acme.update(ENTITIES[0], "p", {"policy_name": "shown"})
        await acme.create(named("mark", id="last"))
        async with Stream(app, f"{PATH}:watch?cursor={cursor}") as stream:
            assert await told(stream, "last") == [("update", None, "hidden too"), ("update", "hidden too", "shown")]


@pytest.mark.parametrize("pages", [1, 100])
async def test_a_stream_too_far_behind_to_evaluate_rules_restarts(monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    monkeypatch.setattr(changes, "FIRST_PAGE", 3)
    monkeypatch.setattr(changes, "PAGE", 3)
    monkeypatch.setattr(visible, "LOOK_AHEAD_PAGES", pages)
    monkeypatch.setattr(visible, "LOOK_AHEAD", 3)
    async with ruled(is_secret) as (acme, app):
        async with Stream(app, f"{PATH}:watch") as early:
            cursor = (await early.event() or {})["id"]
        for number in range(10):
            await acme.replace(named(f"open {number}", id="p"))
        async with Stream(app, f"{PATH}:watch?cursor={cursor}") as stream:
            await stream.event()
            event = await stream.event()
            assert event is not None
            assert event["event"] == ("reset" if pages == 1 else "create")
            if pages == 1:
                await acme.create(named("after", id="q"))
                assert json.loads((await stream.event() or {})["data"])["after"]["policy_name"] == "after"


async def test_a_lost_cursor_is_reported_before_and_within_a_stream() -> None:
    async with serving() as served:
        gone = await served.get(f"{PATH}:watch?cursor=99999999")
        assert (gone.status, gone.code) == (410, "gone")
        assert ":memory:" not in gone.json["detail"], "where the store is is nothing for a caller"
        assert served.app.services.watchers == 0
        async with Stream(served.app, f"{PATH}:watch") as stream:
            await stream.event()
            store = served.room.store
            original, lost = store.changes, ["acme"]

            async def put_back(after: str | None, *, tenant: str | None = None, **options: Any) -> Any:
                if tenant in lost:
                    lost.remove(tenant)
                    raise Gone("an older copy was put back")
                return await original(after, tenant=tenant, **options)

            setattr(store, "changes", put_back)  # noqa: B010
            await served.call("PUT", f"{PATH}/p", POLICY)
            event = await stream.event()
            assert event is not None
            assert (event["event"], event["id"]) == ("reset", json.loads(event["data"])["cursor"])
            await served.call("PUT", f"{PATH}/q", POLICY)
            assert json.loads((await stream.event() or {})["data"])["id"] == "q"


async def test_an_invalid_stream_request_is_refused_before_the_stream_starts() -> None:
    async with serving() as served:
        assert (await served.get(f"{PATH}:watch", Last_Event_ID="nonsense")).paths == ["cursor"]
        assert (await served.get(f"{PATH}:watch?colour=red")).paths == ["colour"]
        assert (await served.get("/v1/tenants/acme/nothing:watch")).status == 404
        assert (await served.post(f"{PATH}:watch", {})).status in (404, 405)
        assert served.app.services.watchers == 0


async def test_streams_over_the_bound_get_429_and_closed_streams_free_their_slots() -> None:
    async with serving(bounds=Bounds(max_watchers=2)) as served:
        async with Stream(served.app, f"{PATH}:watch") as one, Stream(served.app, f"{PATH}:watch") as two:
            assert (one.status, two.status) == (200, 200)
            refused = await served.get(f"{PATH}:watch")
            assert (refused.status, refused.code) == (429, "too_many_requests")
        assert served.app.services.watchers == 0
        async with Stream(served.app, f"{PATH}:watch") as again:
            assert again.status == 200


async def test_one_caller_cannot_take_every_stream_slot() -> None:
    async with serving(bounds=Bounds(max_watchers=8)) as served, AsyncExitStack() as stack:
        keys = [await served.manager("read", "acme") for _ in range(2)]
        other = await served.manager("read", "other")

        async def opens(key: str, tenant: str = "acme") -> int:
            stream = Stream(served.app, f"/v1/tenants/{tenant}/policies:watch", key)
            return (await stack.enter_async_context(stream)).status

        # Whichever of its keys a tenant uses, the last quarter is for others.
        assert [await opens(keys[number % 2]) for number in range(7)] == [200] * 6 + [429]
        assert [await opens(other, "other") for _ in range(3)] == [200, 200, 429]
    assert served.app.services.watchers == 0
    assert served.app.services.watchers_of == {}


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


async def test_a_stream_whose_client_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
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
