"""Leaked keys that were imported under another system's hash, and never used here."""

from __future__ import annotations

from pathlib import Path

import pytest

from strongroom import Strongroom
from strongroom.errors import TooManyRequests
from strongroom.keys import slow_hash as slowcheck
from strongroom.keys.leaks import Finding, Sighting
from tests.helpers.stores import new_url
from tests.keys.test_lookup import HASHES, SECRET, TEXT, imported


@pytest.fixture
def url(tmp_path: Path) -> str:
    return new_url("sqlite", tmp_path)


async def reported(room: Strongroom, *texts: str) -> list[Finding]:
    return await room.leaks.report([Sighting(text, "a_key") for text in texts], reporter="scanner")


@pytest.mark.parametrize("kind", HASHES)
async def test_a_leaked_imported_key_is_recognised_by_every_kind_of_hash_and_handled_once(
    room: Strongroom, kind: str
) -> None:
    await room.leaks.set_policy("acme", action="disable")
    (record,) = await imported(room, {**HASHES[kind], "tenant": "acme"}, secret=SECRET)
    wrong, found = await reported(room, TEXT + "x", TEXT)
    assert wrong.leak is None
    assert found.leak is not None
    assert (found.leak.key_id, found.leak.done, found.new) == (record.id, "disabled", True)
    assert (await room.keys.verify(TEXT)).code == "DISABLED"
    assert await reported(room, TEXT) == [Finding(found.leak)]


@pytest.mark.parametrize("kind", HASHES)
async def test_a_leaked_deleted_imported_key_is_handled_before_it_is_restored(room: Strongroom, kind: str) -> None:
    await room.leaks.set_policy("acme", action="disable")
    (record,) = await imported(room, {**HASHES[kind], "tenant": "acme"}, secret=SECRET)
    await room.keys.delete(record.id)
    (found,) = await reported(room, TEXT)
    assert found.leak is not None
    assert found.leak.done == "disabled"
    await room.keys.restore(record.id)
    assert (await room.keys.verify(TEXT)).code == "DISABLED"
    assert await reported(room, TEXT) == [Finding(found.leak)]


async def test_a_secret_that_cannot_be_compared_yet_does_not_delay_the_rest_of_a_report(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that are no keys use up the guesses of a hint; whoever reports again is heard out in the end."""
    monkeypatch.setattr(slowcheck, "GUESSES_PER_S", 0.0)
    junk = [f"abcdefgh.{number:032}" for number in range(30)]
    async with Strongroom.open(url) as room:
        ours = await room.keys.create(name="ours", tenant="acme")
        (record,) = await imported(room, {**HASHES["bcrypt"], "tenant": "acme"})
        with pytest.raises(TooManyRequests, match="21 of 32 secrets") as raised:
            await reported(room, TEXT, ours.text, *junk)
        assert TEXT not in str(raised.value)
        assert [leak.key_id for leak in (await room.leaks.list()).items] == [ours.key.id]
        monkeypatch.setattr(slowcheck, "GUESSES_PER_S", 1e9)
        found = await reported(room, TEXT, ours.text, *junk)
        assert [one.leak.key_id if one.leak is not None else None for one in found] == [
            record.id,
            ours.key.id,
            *(None for _ in junk),
        ]
