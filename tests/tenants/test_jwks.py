"""The cache of an issuer's keys, over real HTTP: what is read when, and what happens while the issuer is away."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from joserfc.jwk import ECKey, RSAKey

from strongroom.errors import ConfigError, Unavailable
from strongroom.tenants import jwks
from strongroom.tenants.jwks import (
    COOL_DOWN_S,
    MAX_BYTES,
    MAX_KEYS,
    MAX_STALE_S,
    MAX_UNKNOWN,
    MAX_WAITING,
    UNKNOWN_FOR_S,
    Jwks,
    SigningKey,
)
from tests.helpers.issuer import Issuer, issuing, key_of, public
from tests.helpers.waiting import PATIENCE_S, wait_until


class Clock:
    """The clock of the cache, which a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def reading(issuer: Issuer, clock: Clock | None = None) -> AsyncIterator[Jwks]:
    """The issuer's keys, without the reads in the background: a test causes them."""
    keys = Jwks(issuer.url, now=clock or Clock())
    try:
        yield keys
    finally:
        await keys.close()


def kids(found: Any) -> list[str | None]:
    return [key.kid for key in found]


async def test_many_requests_share_one_read() -> None:
    async with issuing() as issuer, reading(issuer) as keys:
        found = await asyncio.gather(*(keys.find("k1") for _ in range(50)))
        assert issuer.asked == 1
        assert {kids(one)[0] for one in found} == {"k1"}
        assert await keys.find("k1")
        assert issuer.asked == 1, "a known key was read again"


async def test_a_request_that_gives_up_does_not_end_the_read_of_the_others() -> None:
    async with issuing() as issuer, reading(issuer) as keys:
        first, second = (asyncio.create_task(keys.find("k1")) for _ in range(2))
        await asyncio.sleep(0)
        first.cancel()
        assert kids(await second) == ["k1"]


async def test_invented_key_ids_cause_one_read_in_each_cool_down_and_take_bounded_memory() -> None:
    clock = Clock()
    async with issuing() as issuer, reading(issuer, clock) as keys:
        for round in range(3):
            for number in range(2 * MAX_UNKNOWN // 3):
                assert not await keys.find(f"invented {round} {number}")
            assert issuer.asked == round + 1
            assert len(keys._unknown) <= MAX_UNKNOWN
            clock.now += COOL_DOWN_S + 1


async def test_an_unknown_key_id_is_remembered_for_a_moment() -> None:
    clock = Clock()
    async with issuing() as issuer, reading(issuer, clock) as keys:
        assert not await keys.find("k2")
        clock.now += COOL_DOWN_S + 1
        assert not await keys.find("k2")
        assert issuer.asked == 1, "the same unknown id caused a second read"
        clock.now += UNKNOWN_FOR_S
        assert not await keys.find("k2")
        assert issuer.asked == 2


async def test_a_new_key_works_after_the_cool_down_and_with_it_those_that_came_along() -> None:
    clock = Clock()
    async with issuing() as issuer, reading(issuer, clock) as keys:
        assert await keys.find("k1")
        assert not await keys.find("k2"), "the cool-down lasts: nothing is remembered as unknown"
        issuer.keys.append(public(key_of("RS256", "k2")))
        issuer.keys.append(public(key_of("RS256", "k3")))
        clock.now += COOL_DOWN_S + 1
        assert kids(await keys.find("k2")) == ["k2"]
        assert kids(await keys.find("k3")) == ["k3"]
        assert issuer.asked == 2


async def test_a_withdrawn_key_is_gone_after_the_next_read_and_the_others_stay_the_same_objects() -> None:
    async with issuing() as issuer, reading(issuer) as keys:
        issuer.keys.append(public(key_of("RS256", "k2")))
        (first,) = await keys.find("k1")
        assert await keys.find("k2")
        del issuer.keys[1]
        await keys.read()
        assert not await keys.find("k2")
        assert await keys.find("k1") == (first,)


def _weak() -> dict[str, Any]:
    with pytest.warns(match="2048"):
        return public(RSAKey.generate_key(1_024, {"kid": "weak"}))


FAILURES: dict[str, Callable[[Issuer], None]] = {
    "an error": lambda issuer: setattr(issuer, "status", "500 Oh no"),
    "gone": lambda issuer: setattr(issuer, "status", "404 Not Found"),
    "a redirect": lambda issuer: issuer.__dict__.update(
        status="302 Found", headers="location: http://127.0.0.1:9/\r\n"
    ),
    "not JSON": lambda issuer: setattr(issuer, "raw", b"<html>"),
    "no object": lambda issuer: setattr(issuer, "raw", b"[]"),
    "no keys": lambda issuer: setattr(issuer, "raw", b'{"keys": []}'),
    "keys that are none": lambda issuer: setattr(issuer, "raw", b'{"keys": [1, null, "k1", [], {}]}'),
    "nested without end": lambda issuer: setattr(issuer, "raw", b'{"keys": ' + b"[" * 100_000),
    "10 MB": lambda issuer: setattr(issuer, "raw", json.dumps({"keys": issuer.keys}).encode() + b" " * 10_000_000),
    "too many keys": lambda issuer: setattr(issuer, "keys", issuer.keys * (MAX_KEYS + 1)),
    "compressed": lambda issuer: issuer.__dict__.update(
        raw=gzip.compress(b" " * 10_000_000), headers="content-encoding: gzip\r\n"
    ),
    "only keys of other kinds": lambda issuer: setattr(
        issuer, "keys", [{"kty": "AKP", "kid": "k1", "alg": "ML-DSA-44", "pub": "AA"}]
    ),
    "only a weak key": lambda issuer: setattr(issuer, "keys", [_weak()]),
    "never answering": lambda issuer: setattr(issuer, "silent", True),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=list(FAILURES))
async def test_a_failed_read_changes_nothing_and_old_keys_serve_for_a_day(
    fail: Callable[[Issuer], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    async with issuing() as issuer, reading(issuer, clock) as keys:
        (known,) = await keys.find("k1")
        fail(issuer)
        monkeypatch.setattr(jwks, "TIMEOUT_S", 0.2 if issuer.silent else PATIENCE_S)
        await keys.read()
        assert keys.state().error
        assert (keys.state().keys, keys.state().age_s) == (1, 0.0)
        assert await keys.find("k1") == (known,)
        clock.now += MAX_STALE_S
        assert await keys.find("k1") == (known,)
        with pytest.raises(Unavailable, match="cannot be read"):
            await keys.find("k2")  # it may be a new one
        clock.now += 1
        with pytest.raises(Unavailable, match="cannot be read"):
            await keys.find("k1")
        issuer.__dict__.update(status="200 OK", headers="", raw=None, silent=False, keys=[public(issuer.key)])
        clock.now += COOL_DOWN_S
        assert kids(await keys.find("k1")) == ["k1"]
        assert keys.state().error is None


async def test_an_issuer_that_never_answers_holds_few_requests_and_none_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jwks, "TIMEOUT_S", 0.3)
    async with issuing() as issuer, reading(issuer) as keys:
        issuer.silent = True
        waits = [asyncio.create_task(keys.find(f"k{number}")) for number in range(MAX_WAITING + 20)]
        done, waiting = await asyncio.wait(waits, timeout=0.1)
        assert len(waiting) == MAX_WAITING, "all of them wait"
        assert all(isinstance(one.exception(), Unavailable) for one in done)
        async with asyncio.timeout(PATIENCE_S):
            results = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(one, Unavailable) for one in results)
        with pytest.raises(Unavailable, match=r"no whole answer within 0\.3 s"):
            await keys.find("k1")
        assert issuer.asked == 1, "read again within the cool-down"


async def test_an_issuer_that_is_not_there_is_told_as_such() -> None:
    async with issuing() as issuer:
        pass
    async with reading(issuer) as keys:
        with pytest.raises(Unavailable, match="ConnectError"):
            await keys.find("k1")


async def test_one_bad_key_does_not_spoil_the_others(caplog: pytest.LogCaptureFixture) -> None:
    private = key_of("RS256", "private").as_dict(private=True)
    good = public(key_of("ES256", "good"))
    async with issuing() as issuer, reading(issuer) as keys:
        issuer.keys = [
            _weak(), private, {**good, "kid": "broken", "x": "AA"}, {**good, "kid": "curve", "crv": "secp256k1"},
            {**good, "kid": 7}, {**good, "kid": ""}, {**good, "kid": "k" * 300}, {**good, "kid": "use", "use": "enc"},
            {**good, "kid": "ops", "key_ops": 1}, {"kty": "oct", "k": "AAAA", "kid": "secret"}, {"kid": "no kind"},
            {"kty": "RSA", "n": "!!", "e": "AQAB", "kid": "n"}, {"kty": ["RSA"]},
            {**good, "kid": "alg", "alg": "RS256"}, {**good, "kid": "future", "x5t#S256": "AA", "more": {"a": [1]}},
            good,
        ]  # fmt: skip
        with caplog.at_level(logging.WARNING):
            await keys.read()
        assert keys.state().error is None
        assert sorted(str(kid) for kid in kids(keys._published.values())) == ["future", "good"]
        assert "anyone can sign" in caplog.text
        assert "it has 1024 bits" in caplog.text
        assert str(private["d"]) not in caplog.text


async def test_keys_with_one_id_are_both_kept() -> None:
    async with issuing() as issuer, reading(issuer) as keys:
        issuer.keys = [public(key_of("ES256", "k1")), public(key_of("RS256", "k1")), public(key_of("ES384", "k3"))]
        found = await keys.find("k1")
        assert [(key.fits("ES256"), key.fits("RS256")) for key in found] == [(True, False), (False, True)]
        assert len(await keys.find(None)) == 3, "a token without an id may be by any key"


async def test_keys_without_an_id_serve_tokens_without_one() -> None:
    async with issuing() as issuer, reading(issuer) as keys:
        bare = public(ECKey.generate_key("P-256"))
        bare.pop("kid", None)
        issuer.keys = [bare]
        assert kids(await keys.find(None)) == [None]
        assert not await keys.find("k1")


# --- In the background, and from a file ------------------------------------------------------------------------


async def test_the_keys_are_read_at_the_start_and_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jwks, "REFRESH_S", 0.02)
    monkeypatch.setattr(jwks, "FIRST_RETRY_S", 0.02)
    async with issuing() as issuer:
        keys = Jwks(issuer.url)
        keys.start()
        try:
            await wait_until(lambda: issuer.asked >= 3)
            issuer.status = "500 Oh no"
            await wait_until(lambda: keys.state().error)
            issuer.status = "200 OK"
            await wait_until(lambda: keys.state().error is None)
        finally:
            await keys.close()
        asked = issuer.asked
        await asyncio.sleep(0.1)
        assert issuer.asked == asked, "read after it was closed"


def _write(file: Path, *keys: dict[str, Any]) -> None:
    file.write_text(json.dumps({"keys": keys}))


async def test_a_file_is_read_at_the_start_and_again_for_a_new_key(tmp_path: Path) -> None:
    file, clock = tmp_path / "jwks.json", Clock()
    _write(file, public(key_of("RS256")))
    keys = Jwks(str(file), now=clock)
    keys.start()
    try:
        found = await keys.find("k1")
        assert [type(key) for key in found] == [SigningKey]
        _write(file, public(key_of("RS256")), public(key_of("ES256", "k2")))
        clock.now += COOL_DOWN_S + 1
        assert kids(await keys.find("k2")) == ["k2"]
    finally:
        await keys.close()


@pytest.mark.parametrize("content", [None, b"", b"{}", b'{"keys": []}', b" " * (MAX_BYTES + 1)])
async def test_a_file_that_cannot_be_used_stops_the_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "jwks.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"STRONGROOM_JWKS: .*jwks\.json: "):
        Jwks(str(file)).start()
