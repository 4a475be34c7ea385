"""Leaked keys: recognised by any of their secrets, handled once by their tenant's policy, wholly or not at all."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import tomllib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom import ApiKey, Query, Strongroom, Where
from strongroom.context import Context, system_context
from strongroom.errors import Denied, InvalidInput, Unavailable
from strongroom.events.outbox import Event
from strongroom.keys.leaks import (
    MAX_SIGHTINGS,
    MAX_URL_CHARS,
    Finding,
    Leak,
    LeakPolicy,
    Sighting,
)
from strongroom.keys.service import IssuedKey
from strongroom.keys.token import SCAN_PATTERN, generate
from strongroom.storage.port import Create, Patch, Record
from tests.helpers.faulty_store import Fault, FaultyStore
from tests.helpers.paths import DOCS
from tests.helpers.stores import new_url, opened

URL = "https://code.example/acme/app/blob/1/settings.py"
DAY = timedelta(days=1)


async def make(room: Strongroom, **fields: Any) -> IssuedKey:
    return await room.keys.create(**{"name": "k", "tenant": "acme", **fields})


async def reported(room: Strongroom, *texts: str, tenant: str | None = None) -> list[Finding]:
    sightings = [Sighting(text, "a_key", URL, "content") for text in texts]
    return await room.leaks.report(sightings, reporter="scanner", tenant=tenant)


async def leaked(room: Strongroom, text: str) -> Leak:
    (finding,) = await reported(room, text)
    assert finding.leak is not None
    assert finding.new
    return finding.leak


async def code(room: Strongroom, text: str) -> str:
    return (await room.keys.verify(text)).code


async def journal(room: Strongroom, *collections: str) -> Sequence[Record]:
    records = (await room.store.changes(None)).records
    return [record for record in records if record.collection in collections]


# --- What is done ---------------------------------------------------------------------------------------------


async def test_without_a_policy_a_leak_is_recorded_and_announced_and_the_key_stays_valid(room: Strongroom) -> None:
    issued = await make(room)
    leak = await leaked(room, issued.text)
    assert (leak.done, leak.ends_at, leak.last_administrator) == ("notified", None, False)
    assert (leak.tenant, leak.key_id, leak.display) == ("acme", issued.key.id, issued.key.display)
    assert (leak.url, leak.source, leak.type, leak.reporter) == (URL, "content", "a_key", "scanner")
    assert await code(room, issued.text) == "VALID"
    key = await room.keys.get(issued.key.id)
    assert key.leaked_at is not None
    assert key.enabled
    assert (await room.leaks.list()).items == [leak]


async def test_a_leak_is_journalled_with_its_location_and_without_the_secret(room: Strongroom) -> None:
    issued = await make(room)
    await leaked(room, issued.text)
    change, record = [r for r in await journal(room, "api_keys", "leaks") if r.actor == "scanner"]
    assert {change.tenant, record.tenant} == {"acme"}
    assert change.after is not None
    assert set(change.after) == {"leaked_at"}
    assert record.after is not None
    assert (record.action, record.after["url"], record.after["source"]) == ("create", URL, "content")
    assert change.request_id == record.request_id != ""
    assert issued.text not in repr(await journal(room, "api_keys", "leaks"))


async def test_the_event_of_a_leak_is_committed_with_the_leak(room: Strongroom, store: FaultyStore) -> None:
    issued = await make(room, owner="team")
    leak = await leaked(room, issued.text)
    (told,) = (await room.database.find(system_context(), Event)).items
    assert (told.type, told.tenant) == ("key.leaked", "acme")
    data = json.loads(told.body)["data"]
    assert (data["key_id"], data["owner"]) == (issued.key.id, "team")
    assert (data["leak"]["id"], data["leak"]["url"], data["leak"]["done"]) == (leak.id, URL, "notified")
    assert issued.text not in told.body
    (batch,) = [batch for batch in store.batches if told.id in {getattr(o, "id", "") for o in batch.operations}][:1]
    written = {operation.collection for operation in batch.operations if isinstance(operation, Create | Patch)}
    assert written == {"api_keys", "leaks", "webhook_events"}


async def test_a_policy_to_disable_refuses_the_key_at_once(room: Strongroom) -> None:
    await room.leaks.set_policy("acme", action="disable")
    ours, theirs = await make(room), await make(room, tenant="other")
    assert [await code(room, issued.text) for issued in (ours, theirs)] == ["VALID", "VALID"]
    leak = await leaked(room, ours.text)
    assert (leak.done, leak.ends_at) == ("disabled", (await room.keys.get(ours.key.id)).leaked_at)
    assert (await leaked(room, theirs.text)).done == "notified"
    assert [await code(room, issued.text) for issued in (ours, theirs)] == ["DISABLED", "VALID"]


async def test_a_policy_to_rotate_creates_a_secret_to_claim_and_keeps_the_leaked_one_for_its_overlap(
    room: Strongroom,
) -> None:
    await room.leaks.set_policy("acme", action="rotate", overlap_s=3_600)
    issued = await make(room)
    leak = await leaked(room, issued.text)
    key = await room.keys.get(issued.key.id)
    assert leak.done == "rotated"
    assert key.leaked_at is not None
    assert leak.ends_at is not None
    assert abs(leak.ends_at - key.leaked_at - timedelta(hours=1)) < timedelta(seconds=1)
    assert await code(room, issued.text) == "VALID"
    claimed = await room.keys.claim(issued.key.id)
    assert claimed.text != issued.text
    assert [await code(room, text) for text in (issued.text, claimed.text)] == ["VALID", "VALID"]


async def test_a_rotation_without_overlap_ends_the_leaked_secret_at_once(room: Strongroom) -> None:
    await room.leaks.set_policy("acme", action="rotate", overlap_s=0)
    issued = await make(room)
    leak = await leaked(room, issued.text)
    assert leak.ends_at is not None
    assert await code(room, issued.text) == "NOT_FOUND"
    assert await code(room, (await room.keys.claim(issued.key.id)).text) == "VALID"


# --- Texts that were rotated away -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "done", "works"),
    [
        ({"action": "notify"}, "notified", ["VALID", "VALID"]),
        ({"action": "disable"}, "disabled", ["DISABLED", "DISABLED"]),
        ({"action": "rotate", "overlap_s": 0}, "overlap shortened", ["NOT_FOUND", "VALID"]),
        ({"action": "rotate", "overlap_s": 60}, "overlap shortened", ["VALID", "VALID"]),
        ({"action": "rotate", "overlap_s": 86_400}, "notified", ["VALID", "VALID"]),
    ],
)
async def test_a_leaked_previous_secret_does_not_replace_the_current_one(
    room: Strongroom, policy: dict[str, Any], done: str, works: list[str]
) -> None:
    await room.leaks.set_policy("acme", **policy)
    issued = await make(room)
    present = await room.keys.rotate(issued.key.id, overlap_s=3_600)
    leak = await leaked(room, issued.text)
    assert (leak.key_id, leak.done) == (issued.key.id, done)
    key = await room.keys.get(issued.key.id)
    assert [await code(room, text) for text in (issued.text, present.text)] == works
    if done != "disabled":
        assert leak.ends_at == (key.previous_until if key.previous_until is not None else key.leaked_at)
    if policy.get("overlap_s") == 60:
        assert key.leaked_at is not None
        assert leak.ends_at == key.leaked_at + timedelta(seconds=60)


async def test_a_secret_after_its_overlap_belongs_to_no_key(room: Strongroom) -> None:
    issued = await make(room)
    await room.keys.rotate(issued.key.id)
    assert await reported(room, issued.text) == [Finding(None)]
    assert (await room.keys.get(issued.key.id)).leaked_at is None


@pytest.mark.parametrize("how", ["replaced", "its overlap ended"])
async def test_a_secret_that_expires_during_the_report_does_not_affect_the_key(
    room: Strongroom, store: FaultyStore, how: str
) -> None:
    await room.leaks.set_policy("acme", action="disable")
    issued = await make(room)
    if how == "its overlap ended":
        await room.keys.rotate(issued.key.id, overlap_s=3_600)
    happened = False

    async def meanwhile(method: str, collection: str) -> None:
        nonlocal happened
        if collection == "leaks" and not happened:
            happened = True
            if how == "replaced":
                await room.keys.rotate(issued.key.id)
            else:
                over = {"previous_until": datetime.now(UTC) - timedelta(seconds=1)}
                await room.database.update(system_context("acme"), ApiKey, issued.key.id, over)

    store.after_read = meanwhile
    assert await reported(room, issued.text) == [Finding(None)]
    assert happened
    key = await room.keys.get(issued.key.id)
    assert (key.enabled, key.leaked_at) == (True, None)
    assert (await room.leaks.list()).items == []


async def test_a_leaked_deleted_key_is_handled_before_it_is_restored(room: Strongroom) -> None:
    await room.leaks.set_policy("acme", action="disable")
    issued = await make(room)
    await room.keys.delete(issued.key.id)
    assert (await leaked(room, issued.text)).done == "disabled"
    await room.keys.restore(issued.key.id)
    assert await code(room, issued.text) == "DISABLED"


async def test_two_secrets_of_one_key_are_two_leaks_even_in_one_report(room: Strongroom) -> None:
    issued = await make(room)
    present = await room.keys.rotate(issued.key.id, overlap_s=3_600)
    found = await reported(room, issued.text, present.text)
    assert all(finding.new for finding in found)
    assert len((await room.leaks.list(key_id=issued.key.id)).items) == 2


# --- Once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["notify", "disable", "rotate"])
async def test_reporting_the_same_secret_again_changes_nothing(room: Strongroom, action: str) -> None:
    await room.leaks.set_policy("acme", action=action)  # type: ignore[arg-type]
    issued = await make(room)
    first = await leaked(room, issued.text)
    before = await room.keys.get(issued.key.id)
    again = await room.leaks.report([Sighting(issued.text, url="https://elsewhere.example")] * 3, reporter="another")
    assert again == [Finding(first)] * 3
    assert (await room.keys.get(issued.key.id)).version == before.version
    assert (await room.leaks.list()).items == [first]


async def test_a_reenabled_key_stays_enabled_when_its_leak_is_reported_again(room: Strongroom) -> None:
    await room.leaks.set_policy("acme", action="disable")
    issued = await make(room)
    await leaked(room, issued.text)
    await room.keys.enable(issued.key.id)
    (again,) = await reported(room, issued.text)
    assert not again.new
    assert await code(room, issued.text) == "VALID"


async def test_a_known_leak_is_recognised_after_a_pepper_rotation(room: Strongroom) -> None:
    issued = await make(room)
    leak = await leaked(room, issued.text)
    await room.rotate_pepper()
    await room.keys.verify(issued.text)  # which brings its hash under the new pepper
    assert await reported(room, issued.text) == [Finding(leak)]


async def test_concurrent_reports_on_two_nodes_rotate_once(tmp_path: Path) -> None:
    url = new_url("sqlite", tmp_path)
    async with opened(url) as (here, _), opened(url) as (there, _):
        await here.leaks.set_policy("acme", action="rotate")
        for _ in range(5):
            issued = await make(here)
            found = await asyncio.gather(*(reported(room, issued.text) for room in (here, there, here, there)))
            leaks = [finding.leak for (finding,) in found]
            assert [finding.new for (finding,) in found].count(True) == 1
            assert len({leak.id for leak in leaks if leak is not None}) == 1
            assert None not in leaks
            rotations = [
                record
                for record in await journal(here, "api_keys")
                if record.entity_id == issued.key.id and record.action == "update"
            ]
            assert len(rotations) == 1


# --- All or nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("action", ["notify", "disable", "rotate"])
async def test_a_failed_commit_leaves_no_partial_handling_and_the_report_can_be_retried(
    room: Strongroom, store: FaultyStore, when: Any, action: str
) -> None:
    await room.leaks.set_policy("acme", action=action)  # type: ignore[arg-type]
    issued = await make(room)
    faults = 0

    def fault(number: int, batch: Any) -> Fault | None:
        nonlocal faults
        if faults == 0 and any(getattr(operation, "collection", "") == "leaks" for operation in batch.operations):
            faults += 1
            return Fault(when, Unavailable("the answer was lost", outcome="unknown"))
        return None

    store.fault = fault
    with pytest.raises(Unavailable):
        await reported(room, issued.text)
    assert faults == 1
    recorded = (await room.leaks.list()).items
    assert len(recorded) == (1 if when == "after" else 0)
    assert ((await room.keys.get(issued.key.id)).leaked_at is not None) == (when == "after")
    (finding,) = await reported(room, issued.text)
    assert finding.leak is not None
    assert finding.new == (when == "before")
    assert len((await room.leaks.list()).items) == 1
    updates = [r for r in await journal(room, "api_keys") if r.action == "update"]
    assert len(updates) == 1


# --- Management keys ------------------------------------------------------------------------------------------


async def administrator(room: Strongroom, **fields: Any) -> IssuedKey:
    return await make(room, **{"tenant": "*", "permissions": ["strongroom:admin"], **fields})


@pytest.mark.parametrize("action", ["disable", "rotate"])
async def test_a_leaked_management_key_is_disabled_instead_of_rotated(room: Strongroom, action: str) -> None:
    for tenant in ("acme", "*"):
        await room.leaks.set_policy(tenant, action=action)  # type: ignore[arg-type]
        await administrator(room)
        for permissions in (["strongroom:write"], ["strongroom:admin", "chat:write"]):
            issued = await make(room, tenant=tenant, permissions=permissions)
            leak = await leaked(room, issued.text)
            assert (leak.done, leak.last_administrator) == ("disabled", False)
            assert await code(room, issued.text) == "DISABLED"
            assert (await room.keys.get(issued.key.id)).unclaimed is None


async def test_disabling_the_last_administrators_key_logs_how_to_regain_access(
    room: Strongroom, caplog: pytest.LogCaptureFixture
) -> None:
    await room.leaks.set_policy("*", action="disable")
    await administrator(room, tenant="acme")
    expired = await administrator(room)
    await room.keys.update(expired.key.id, expires_at="2001-01-01T00:00:00Z")
    one, other = await administrator(room), await administrator(room)
    with caplog.at_level(logging.WARNING, "strongroom.keys.leaks"):
        assert not (await leaked(room, one.text)).last_administrator
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        leak = await leaked(room, other.text)
    assert (leak.done, leak.last_administrator) == ("disabled", True)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "ERROR"]
    assert "strongroom keys create" in caplog.records[-1].getMessage()
    assert one.text not in caplog.text
    assert other.text not in caplog.text


async def test_of_two_administrators_that_leak_at_once_one_counts_as_the_last(room: Strongroom) -> None:
    await room.leaks.set_policy("*", action="disable")
    issued = [await administrator(room) for _ in range(2)]
    found = await reported(room, *(each.text for each in issued))
    assert sorted(finding.leak.last_administrator for finding in found if finding.leak is not None) == [False, True]


# --- Who may know ---------------------------------------------------------------------------------------------


async def test_a_caller_bound_to_a_tenant_learns_nothing_of_other_tenants_keys(room: Strongroom) -> None:
    await room.leaks.set_policy("other", action="disable")
    ours, theirs = await make(room), await make(room, tenant="other")
    found = await reported(room, ours.text, theirs.text, tenant="acme")
    assert [finding.leak is not None for finding in found] == [True, False]
    assert await code(room, theirs.text) == "VALID"
    await leaked(room, theirs.text)
    bound = Context("acme", "key:x", {"admin": True, "tenant": "acme"})
    assert [leak.tenant for leak in (await room.leaks.list(context=bound)).items] == ["acme"]
    assert (await room.leaks.list(tenant="other", context=bound)).items == []
    assert [leak.tenant for leak in (await room.leaks.list()).items] == ["other", "acme"]


async def test_a_leak_policy_belongs_to_its_tenant_and_is_journalled(room: Strongroom) -> None:
    bound = Context("acme", "key:x", {"admin": True, "tenant": "acme"})
    assert (await room.leaks.policy("acme", context=bound)).action == "notify"
    await room.leaks.set_policy("acme", action="rotate", context=bound)
    policy = await room.leaks.policy("acme")
    assert (policy.action, policy.overlap_s) == ("rotate", 86_400)
    for tenant in ("other", "*"):
        with pytest.raises(Denied):
            await room.leaks.policy(tenant, context=bound)
        with pytest.raises(Denied):
            await room.leaks.set_policy(tenant, action="disable", context=bound)
        assert (await room.leaks.policy(tenant)).action == "notify"
    (record,) = [r for r in await journal(room, "leak_policies") if r.action != "deny"]
    assert (record.tenant, record.actor, record.after["action"] if record.after else None) == (
        "acme",
        "key:x",
        "rotate",
    )


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "action"),
        ({"action": "burn"}, "action"),
        ({"action": "rotate", "overlap_s": -1}, "overlap_s"),
        ({"action": "rotate", "overlap_s": 31 * 86_400}, "overlap_s"),
        ({"action": "rotate", "overlap_s": "60"}, "overlap_s"),
        ({"action": "rotate", "colour": 1}, "colour"),
        ({"action": "disable", "overlap_s": 60}, "overlap_s"),
    ],
)
async def test_an_invalid_policy_is_refused_by_field(room: Strongroom, fields: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidInput) as wrong:
        await room.leaks.set_policy("acme", **fields)
    assert [problem.path for problem in wrong.value.problems] == [path]
    for tenant in ("", "a\x00b", "x" * 129):
        with pytest.raises(InvalidInput):
            await room.leaks.policy(tenant)


# --- Bounds ---------------------------------------------------------------------------------------------------


async def test_unknown_secrets_change_nothing_and_cost_at_most_one_lookup_each(
    room: Strongroom, store: FaultyStore
) -> None:
    unknown = [generate() for _ in range(50)]
    await reported(room, *unknown[:1])
    store.reads.clear()
    store.batches.clear()
    mistyped = [text[:-1] + ("0" if text[-1] != "0" else "1") for text in unknown]
    found = await reported(room, *unknown[1:], *unknown[1:], *mistyped, "", "x" * 1_000, "a\x00b", "\ud800")
    assert set(found) == {Finding(None)}
    written = {getattr(operation, "collection", "") for batch in store.batches for operation in batch.operations}
    assert not written & {"api_keys", "leaks", "webhook_events"}
    asked = [collection for _, collection in store.reads]
    assert asked.count("leaks") == asked.count("leak_policies") == 0
    assert asked.count("api_keys") <= 2 * 49  # by its hash, and by that before a rotation


async def test_a_report_has_a_maximum_size(room: Strongroom) -> None:
    with pytest.raises(InvalidInput, match=str(MAX_SIGHTINGS)):
        await reported(room, *["x"] * (MAX_SIGHTINGS + 1))


async def test_a_reports_source_is_stored_without_the_secret_and_without_control_characters(
    room: Strongroom,
) -> None:
    issued = await make(room)
    sighting = Sighting(
        issued.text, f"type {issued.text}", f"https://x.example/?key={issued.text}&{'u' * 3_000}", "\x1b[31mred\x00\n"
    )
    (finding,) = await room.leaks.report([sighting], reporter="scanner")
    assert finding.leak is not None
    assert issued.text not in finding.leak.model_dump_json()
    assert finding.leak.url.startswith(f"https://x.example/?key={issued.key.display}&uuu")
    assert len(finding.leak.url) == MAX_URL_CHARS
    assert finding.leak.source == "\ufffd[31mred\ufffd\ufffd"
    stored = await room.database.get(system_context(), Leak, finding.leak.id)
    assert stored == finding.leak
    assert issued.text not in repr(sighting)


# --- The pattern ----------------------------------------------------------------------------------------------

PAGE = (DOCS / "leaks.md").read_text()


def test_the_documented_pattern_matches_generated_keys() -> None:
    assert SCAN_PATTERN in PAGE
    (rule,) = tomllib.loads(re.findall(r"^```toml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0])["rules"]
    assert rule["regex"] == SCAN_PATTERN
    assert all(word in SCAN_PATTERN for word in rule["keywords"])
    assert SCAN_PATTERN in re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0]


@given(
    st.from_regex(r"[a-z][a-z0-9]{0,8}(_[a-z0-9]{1,5}){0,2}", fullmatch=True),
    st.sampled_from(["", " ", '"', "'", "key=", "Bearer ", "(", "\n", "https://u:"]),
    st.sampled_from(["", " ", '"', "'", ",", ")", "\n", "@host", ";"]),
)
def test_the_documented_pattern_finds_a_key_in_any_context(prefix: str, before: str, after: str) -> None:
    text = generate(prefix)
    assert re.findall(SCAN_PATTERN, before + text + after) == [text]


def test_leaks_and_policies_are_global_and_journalled() -> None:
    for cls in (Leak, LeakPolicy):
        assert not cls.__collection__.tenant_scoped
        assert cls.__collection__.journalled
    assert Query(Where("tenant", "==", "acme"), ("-created_at",)).check(Leak.__collection__)
