"""Identifying names must be in NFC without surrounding spaces, so that names that look alike are equal."""

from __future__ import annotations

import json
import unicodedata
from typing import Any
from urllib.parse import quote

import pytest

from strongroom import Entity, Strongroom
from strongroom.context import name_problem, system_context
from strongroom.errors import InvalidInput
from strongroom.keys.transfer.key_file_parse import parse
from strongroom.storage.port import Batch, Create
from tests.helpers.server_app import TOKENS, serving

COMPOSED = unicodedata.normalize("NFC", "Zoë")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
WRONG = [DECOMPOSED, " a", "a ", "\u00a0a", "a\n"]


class Page(Entity, collection="pages_"):
    text: str = ""


@pytest.fixture
def entities() -> list[type[Entity]]:
    return [Page]


def test_a_name_must_be_in_nfc_without_surrounding_spaces() -> None:
    for right in (COMPOSED, "a b", "ü/€", "日本", "x" * 20):
        assert name_problem(unicodedata.normalize("NFC", right), 128) is None
    for wrong in WRONG:
        assert name_problem(wrong, 128)
    message = name_problem(DECOMPOSED, 128) or ""
    assert ascii(DECOMPOSED) in message
    assert ascii(COMPOSED) in message


@pytest.mark.parametrize("name", WRONG)
async def test_every_input_refuses_an_ambiguous_name(name: str) -> None:
    async with serving() as served:
        limit = {**TOKENS, "models": [name]}
        fields: list[tuple[str, dict[str, Any]]] = [
            ("tenant", {"tenant": name}), ("user_id", {"user_id": name}), ("owner", {"owner": name}),
            ("groups", {"groups": ["a", name]}), ("allowed_models", {"allowed_models": [name]}),
            ("limits", {"limits": [limit]}),
        ]  # fmt: skip
        made = await served.make_key()
        for path, given in fields:
            answer = await served.post("/v1/keys", {"name": "k", **given})
            assert answer.status == 422, (path, answer)
            assert path == "tenant" or answer.paths[0].split(".")[0] == path
            if path != "tenant":
                assert (await served.call("PATCH", f"/v1/keys/{made['id']}", given)).status == 422, path
        segment = quote(name, safe="")
        for at in (
            f"/v1/quotas/user/acme/{segment}",
            f"/v1/quotas/group/acme/{segment}",
            f"/v1/quotas/tenant/{segment}",
        ):
            assert (await served.call("PUT", at, {"limits": [TOKENS]})).status == 422, at
            assert (await served.get(at)).status == 404, "what was stored before can still be looked for"
        policy = {"policy_type": "t", "policy_name": "n"}
        for method, at in (("POST", "policies"), ("PUT", "policies/x")):
            answer = await served.call(method, f"/v1/tenants/{segment}/{at}", policy)
            assert (answer.status, answer.paths) == (422, ["tenant"])
        assert (await served.get(f"/v1/tenants/{segment}/policies")).json["items"] == []
        hook = {"url": "https://example.com/", "tenant": name}
        assert (await served.post("/v1/webhooks", hook)).paths == ["tenant"]
        assert (await served.call("PUT", f"/v1/leaks/policy/{segment}", {"action": "notify"})).paths == ["tenant"]
        assert (await served.post("/v1/keys", {"name": name, "metadata": {"a": name}})).status == 201, "is only shown"


async def test_documents_under_an_ambiguous_name_of_an_earlier_version_stay_usable(
    room: Strongroom,
) -> None:
    if room.store.capabilities.name != "json":
        return
    batch = Batch(DECOMPOSED, (Create("pages_", "p", {"text": "old"}),), system_context().now_us + 0)
    await room.store.commit(batch)
    old = room.tenant(DECOMPOSED)
    assert (await old.get(Page, "p")).text == "old"
    assert (await old.update(Page, "p", {"text": "new"})).text == "new"
    with pytest.raises(InvalidInput):
        await old.create(Page(text="more"))
    await old.delete(Page, "p")


@pytest.mark.parametrize("name", WRONG)
def test_an_import_refuses_an_ambiguous_user_name(name: str) -> None:
    now_us = 1_800_000_000_000_000
    row = {"name": "k", "user_id": name, "created_at": "2026-01-01T00:00:00Z", "expires_at": None, "last_used": None}
    read = parse(json.dumps({"keys": {"a" * 64: row, "b" * 64: {**row, "user_id": COMPOSED}}}).encode(), now_us)
    assert [row.user_id for row in read.rows] == [COMPOSED]
    assert [problem.path.rpartition(".")[2] for problem in read.problems] == ["user_id"]
