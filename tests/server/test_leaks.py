"""`POST /v1/keys/leaked`: reports signed as in GitHub's programme, management keys, policies over HTTP."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from strongroom import config
from strongroom.errors import ConfigError
from strongroom.keys.leaks import MAX_SIGHTINGS
from strongroom.keys.token import generate
from strongroom.server import signers
from strongroom.server.app import Bounds
from strongroom.server.signers import Signers
from tests.helpers.server_app import ADMIN, Reply, Served, serving
from tests.helpers.waiting import PATIENCE_S

ID = "4fe6b016179b74078ade7581abf4e84fb398c6fae4fb973972235b84fcd70ca3"
URL = "https://code.example/acme/app/blob/1/settings.py"


def pem(key: Any) -> str:
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return str(key.public_key().public_bytes(serialization.Encoding.PEM, form).decode())


def listed(**keys: Any) -> dict[str, Any]:
    """A list of public keys, as the programme publishes it."""
    return {"public_keys": [{"key_identifier": id, "key": pem(k), "is_current": True} for id, k in keys.items()]}


KEY = ec.generate_private_key(ec.SECP256R1())
OTHER = ec.generate_private_key(ec.SECP256R1())


def signed(body: bytes, key: Any = KEY, id: str = ID) -> dict[str, str]:
    signature = base64.b64encode(key.sign(body, ec.ECDSA(hashes.SHA256()))).decode()
    return {"Github_Public_Key_Identifier": id, "Github_Public_Key_Signature": signature}


def report(*tokens: str) -> bytes:
    items = [{"token": token, "type": "a_key", "url": URL, "source": "content"} for token in tokens]
    return json.dumps(items, indent=1).encode()  # not as our own encoder would write it: the raw body is what is signed


async def send(served: Served, body: bytes, **headers: str) -> Reply:
    return await served.post("/v1/keys/leaked", body, key=None, **headers)


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(listed(**{ID: KEY})))
    return file


@pytest.fixture
async def served(key_file: Path) -> AsyncIterator[Served]:
    async with serving_with(str(key_file)) as served:
        yield served


@asynccontextmanager
async def serving_with(leak_keys: str | None, **more: Any) -> AsyncIterator[Served]:
    async with serving(**more) as served:
        served.app.services.signers = Signers(leak_keys) if leak_keys is not None else None
        yield served


# --- A report of the programme --------------------------------------------------------------------------------


async def test_a_signed_report_is_handled_and_answered_with_a_label_for_each_secret(served: Served) -> None:
    await served.call("PUT", "/v1/leaks/policy/acme", {"action": "disable"})
    made = await served.make_key(tenant="acme")
    unknown = generate()
    body = report(made["key"], unknown, made["key"])
    answer = await send(served, body, **signed(body))
    assert answer.status == 200
    assert answer.answer.json() == [
        {"token_hash": hashlib.sha256(token.encode()).hexdigest(), "token_type": "a_key", "label": label}
        for token, label in (
            (made["key"], "true_positive"),
            (unknown, "false_positive"),
            (made["key"], "true_positive"),
        )
    ]
    assert (await served.verify(made["key"])).json["code"] == "DISABLED"
    leaks = await served.get("/v1/leaks?tenant=acme")
    (leak,) = leaks.json["items"]
    assert (leak["key_id"], leak["url"], leak["done"]) == (made["id"], URL, "disabled")
    assert leak["reporter"] == f"secret-scanning:{ID}"
    again = await send(served, body, **signed(body))
    assert again.answer.json() == answer.answer.json()
    assert (await served.get("/v1/leaks")).json["items"] == [leak]


async def test_unknown_and_optional_fields_of_a_report_are_ignored(served: Served) -> None:
    made = await served.make_key()
    body = json.dumps([{"token": made["key"], "url": None, "since": "then"}]).encode()
    answer = await send(served, body, **signed(body))
    assert [item["label"] for item in answer.answer.json()] == ["true_positive"]
    assert (await send(served, b"[]", **signed(b"[]"))).answer.json() == []


def _flipped(text: str) -> str:
    raw = bytearray(base64.b64decode(text))
    raw[-1] ^= 1
    return base64.b64encode(raw).decode()


BODY = report("sr_x")
GOOD = signed(BODY)
NOT_SIGNED = {
    "nothing at all": {},
    "no signature": {"Github_Public_Key_Identifier": ID},
    "no identifier": {"Github_Public_Key_Signature": GOOD["Github_Public_Key_Signature"]},
    "empty": {"Github_Public_Key_Identifier": "", "Github_Public_Key_Signature": ""},
    "an unknown key": signed(BODY, id="0" * 64),
    "another's signature": signed(BODY, OTHER),
    "another body's": signed(BODY + b" "),
    "altered": {**GOOD, "Github_Public_Key_Signature": _flipped(GOOD["Github_Public_Key_Signature"])},
    "not base64": {**GOOD, "Github_Public_Key_Signature": "!" + GOOD["Github_Public_Key_Signature"]},
    "too long": {**GOOD, "Github_Public_Key_Signature": "A" * 4_000},
    "beside a management key": {**signed(BODY, OTHER), "Authorization": f"Bearer {ADMIN}"},
}


@pytest.mark.parametrize("headers", NOT_SIGNED.values(), ids=list(NOT_SIGNED))
async def test_a_wrong_signature_is_refused_without_effect_or_hint(served: Served, headers: dict[str, str]) -> None:
    made = await served.make_key()
    real = {name: value.replace("sr_x", made["key"]) for name, value in headers.items()}
    refusals = []
    for body in (BODY, report(made["key"]), b"not JSON"):
        answer = await send(served, body, **real)
        assert answer.status == 401
        refusals.append({**answer.json, "request_id": ""})
    assert refusals[0] == refusals[1] == refusals[2], "it depends on what was reported"
    assert (await served.get("/v1/leaks")).json["items"] == []
    assert (await served.get(f"/v1/keys/{made['id']}")).json["leaked_at"] is None


async def test_without_public_keys_no_signature_is_accepted() -> None:
    async with serving_with(None) as served:
        assert (await send(served, BODY, **GOOD)).status == 401


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_other_methods_of_its_path_need_a_management_key(served: Served, method: str) -> None:
    assert (await served.call(method, "/v1/keys/leaked", key=None)).status == 401
    assert (await served.call(method, "/v1/keys/leaked")).status in (404, 405)


# --- Other scanners -------------------------------------------------------------------------------------------


async def test_a_management_key_with_write_scope_reports_leaks_of_its_tenant_only(served: Served) -> None:
    ours, theirs = await served.make_key(tenant="acme"), await served.make_key(tenant="other")
    body = report(ours["key"], theirs["key"])
    for scope, status in (("read", 403), ("write", 200)):
        manager = await served.manager(scope, "acme")
        assert (await served.post("/v1/keys/leaked", body, key=manager)).status == status
        assert (await served.post("/v1/keys/leaked", body, key=ours["key"])).status == 403
        assert (await served.post("/v1/keys/leaked", body, key="nonsense")).status == 401
    labels = [i["label"] for i in (await served.post("/v1/keys/leaked", body, key=manager)).answer.json()]
    assert labels == ["true_positive", "false_positive"]
    (leak,) = (await served.get("/v1/leaks")).json["items"]
    assert leak["key_id"] == ours["id"]
    assert leak["reporter"].startswith("key:key_")
    assert (await served.get("/v1/leaks", key=await served.manager("read", "other"))).json["items"] == []
    labels = [i["label"] for i in (await served.post("/v1/keys/leaked", body)).answer.json()]
    assert labels == ["true_positive", "true_positive"]


@pytest.mark.parametrize(
    ("body", "status", "paths"),
    [
        (b"", 400, None),
        (b"{", 400, None),
        (b"{}", 422, [""]),
        (b'[5, {"token": "a"}, {"type": 1, "url": {}}]', 422, ["0", "2.token", "2.type", "2.url"]),
        (b'[{"token": "\\ud800"}]', 422, ["0.token"]),
        (b'[{"token": NaN}]', 422, ["0.token"]),
        (json.dumps([{"token": "x"}] * (MAX_SIGHTINGS + 1)).encode(), 422, [""]),
    ],
)
async def test_what_is_not_a_report_is_refused_whole(
    served: Served, body: bytes, status: int, paths: list[str] | None
) -> None:
    for answer in (await send(served, body, **signed(body)), await served.post("/v1/keys/leaked", body)):
        assert answer.status == status
        assert paths is None or answer.paths == paths


@pytest.mark.parametrize("configured", [True, False])
async def test_no_body_is_read_from_a_caller_without_credentials(configured: bool, key_file: Path) -> None:
    async with serving_with(str(key_file) if configured else None) as served:
        body, read = report(generate()), []

        async def content() -> AsyncIterator[bytes]:
            read.append(body)
            yield body

        reader = await served.manager("read")
        unknown = signed(body, id="another")
        refused: list[tuple[dict[str, str], int]] = [
            ({}, 401), ({"Authorization": "Bearer sr_nobody"}, 401), ({"Authorization": f"Bearer {reader}"}, 403),
            (unknown, 401), ({**signed(body), "Github_Public_Key_Signature": "no base64"}, 401),
            ({"Github_Public_Key_Identifier": ID}, 401), (signed(body) if not configured else {}, 401),
        ]  # fmt: skip
        for headers, status in refused:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            answer = await served.client.post("/v1/keys/leaked", content=content(), headers=named)
            assert (answer.status_code, read) == (status, []), headers
        assert (await send(served, body, **signed(body, OTHER))).status == 401
        assert (await served.post("/v1/keys/leaked", body)).status == 200


async def test_a_body_past_the_bound_is_refused() -> None:
    async with serving_with(None, bounds=Bounds(max_body_bytes=2_000)) as served:
        assert (await served.post("/v1/keys/leaked", report("x" * 3_000))).status == 413
        assert (await send(served, report("x" * 3_000))).status in (401, 413)


# --- Policies -------------------------------------------------------------------------------------------------


async def test_a_policy_is_read_by_readers_and_set_by_administrators_of_the_tenant(served: Served) -> None:
    path = "/v1/leaks/policy/acme"
    assert (await served.get(path)).json == {
        "tenant": "acme",
        "action": "notify",
        "overlap_s": None,
        "updated_at": None,
    }
    body = {"action": "rotate", "overlap_s": 600}
    callers = {
        (scope, tenant): await served.manager(scope, tenant)
        for scope in ("read", "write", "admin")
        for tenant in ("acme", "other")
    }
    for (scope, tenant), caller in callers.items():
        ours = tenant == "acme"
        assert (await served.get(path, key=caller)).status == (200 if ours else 403)
        set_it = await served.call("PUT", path, body, key=caller)
        assert set_it.status == (200 if ours and scope == "admin" else 403)
        assert (await served.call("PUT", "/v1/leaks/policy/*", body, key=caller)).status == 403
    found = (await served.get(path)).json
    assert found.pop("updated_at") is not None
    assert found == {"tenant": "acme", **body}
    assert (await served.call("PUT", "/v1/leaks/policy/*", body)).json["tenant"] == "*"
    assert (await served.call("PUT", "/v1/leaks/policy/a%2Fb", body)).json["tenant"] == "a/b"


@pytest.mark.parametrize(
    ("body", "paths"),
    [
        ({}, ["action"]),
        ({"action": "burn", "colour": 1}, ["action", "colour"]),
        ({"action": "rotate", "overlap_s": 2_592_001}, ["overlap_s"]),
        ({"action": "rotate", "overlap_s": 1.5}, ["overlap_s"]),
        ({"action": "notify", "overlap_s": 60}, ["overlap_s"]),
        ({"action": "notify", "tenant": "x", "context": 1, "self": 2}, ["context", "self", "tenant"]),
    ],
)
async def test_an_invalid_policy_is_refused_with_its_field(
    served: Served, body: dict[str, Any], paths: list[str]
) -> None:
    answer = await served.call("PUT", "/v1/leaks/policy/acme", body)
    assert (answer.status, answer.paths) == (422, paths)


# --- The list of public keys ----------------------------------------------------------------------------------


class Publisher:
    """A real HTTP server that publishes a list of keys, or something else."""

    def __init__(self) -> None:
        self.answer = b""
        self.asked = 0
        self.silent = False

    def publish(self, body: bytes, status: str = "200 OK", headers: str = "") -> None:
        self.answer = f"HTTP/1.1 {status}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        self.asked += 1
        if not self.silent:
            writer.write(self.answer)
            await writer.drain()
        else:
            await reader.read()  # until the other side gives up
        writer.close()
        await writer.wait_closed()


class Clock:
    """The clock of the list's age, which a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(signers, "time", clock)
    return clock


@pytest.fixture
async def publisher(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Publisher, str]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    publisher = Publisher()
    publisher.publish(json.dumps(listed(**{ID: KEY})).encode())
    server = await asyncio.start_server(publisher.serve, "127.0.0.1", 0)
    async with server:
        yield publisher, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/keys"


async def test_the_public_keys_are_fetched_on_demand_and_cached(publisher: tuple[Publisher, str], clock: Clock) -> None:
    told, url = publisher
    async with serving_with(url) as served:
        assert told.asked == 0
        answers = await asyncio.gather(*(send(served, BODY, **GOOD) for _ in range(10)))
        assert {answer.status for answer in answers} == {200}
        assert told.asked == 1
        clock.now += signers.MAX_AGE_S + 1
        assert (await send(served, BODY, **GOOD)).status == 200
        assert told.asked == 2


async def test_unknown_key_identifiers_cause_at_most_one_fetch_a_minute(
    publisher: tuple[Publisher, str], clock: Clock
) -> None:
    told, url = publisher
    async with serving_with(url) as served:
        guesses = [signed(BODY, OTHER, f"{number:064x}") for number in range(20)]
        answers = await asyncio.gather(*(send(served, BODY, **guess) for guess in guesses))
        assert {answer.status for answer in answers} == {401}
        assert told.asked == 1
        # A key that is new in the list is known within a minute.
        told.publish(json.dumps(listed(**{ID: KEY, "1" * 64: OTHER})).encode())
        new = signed(BODY, OTHER, "1" * 64)
        assert (await send(served, BODY, **new)).status == 401
        clock.now += signers.RETRY_S + 1
        assert (await send(served, BODY, **new)).status == 200
        # And one that was taken from it is not believed any more.
        told.publish(json.dumps(listed(**{ID: KEY})).encode())
        clock.now += signers.MAX_AGE_S + 1
        assert (await send(served, BODY, **new)).status == 401
        assert told.asked == 3


BROKEN = {
    "gone": (b"", "404 Not Found", ""),
    "elsewhere": (b"", "302 Found", "location: http://127.0.0.1:9/\r\n"),
    "not JSON": (b"<html>", "200 OK", ""),
    "another shape": (b'{"keys": []}', "200 OK", ""),
    "empty": (b'{"public_keys": []}', "200 OK", ""),
    "huge": (json.dumps(listed(**{ID: KEY})).encode() + b" " * signers.MAX_LIST_BYTES, "200 OK", ""),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=list(BROKEN))
async def test_without_the_key_list_reports_get_503_and_cached_keys_stay_valid_for_a_day(
    publisher: tuple[Publisher, str], clock: Clock, broken: tuple[bytes, str, str]
) -> None:
    told, url = publisher
    async with serving_with(url) as served:
        good = told.answer
        told.publish(*broken)
        for _ in range(3):
            answer = await send(served, BODY, **GOOD)
            assert (answer.status, answer.json["code"]) == (503, "unavailable")
        assert told.asked == 1
        told.answer = good
        clock.now += signers.RETRY_S + 1
        assert (await send(served, BODY, **GOOD)).status == 200
        told.publish(*broken)
        clock.now += signers.MAX_AGE_S + 1
        assert (await send(served, BODY, **GOOD)).status == 200
        assert (await send(served, BODY, **signed(BODY, OTHER))).status == 401
        assert (await send(served, BODY, **signed(BODY, OTHER, "1" * 64))).status == 503
        clock.now += signers.MAX_STALE_S
        assert (await send(served, BODY, **GOOD)).status == 503


async def test_a_fetch_of_the_key_list_times_out(
    publisher: tuple[Publisher, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told, url = publisher
    told.silent = True
    monkeypatch.setattr(signers, "TIMEOUT_S", 0.1)
    async with serving_with(url) as served:
        answer = await asyncio.wait_for(send(served, BODY, **GOOD), PATIENCE_S)
        assert answer.status == 503


@pytest.mark.parametrize(
    "other",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        rsa.generate_private_key(65_537, 2_048),
    ],
    ids=["P-384", "secp256k1", "RSA"],
)
async def test_public_keys_of_another_kind_are_ignored(tmp_path: Path, other: Any) -> None:
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(listed(**{ID: KEY, "1" * 64: other})))
    async with serving_with(str(file)) as served:
        assert (await send(served, BODY, **GOOD)).status == 200
        if isinstance(other, ec.EllipticCurvePrivateKey):
            assert (await send(served, BODY, **signed(BODY, other, "1" * 64))).status == 401
    file.write_text(json.dumps(listed(**{"1" * 64: other})))
    with pytest.raises(ConfigError, match="P-256"):
        Signers(str(file))


@pytest.mark.parametrize("content", [None, "", "{}", '{"public_keys": [{"key": "x", "key_identifier": "y"}]}'])
def test_an_unusable_file_of_public_keys_stops_the_start(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "keys.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=r"STRONGROOM_LEAK_KEYS.*keys\.json"):
        Signers(str(file))


@pytest.mark.parametrize(
    ("place", "right"),
    [
        ("https://keys.example/list", True),
        ("http://127.0.0.1:8000/list", True),
        ("http://localhost/list", True),
        ("http://[::1]:80/list", True),
        ("keys.json", True),
        ("http://keys.example/list", False),
        ("http://127.0.0.1.example/list", False),
        ("http://localhost@keys.example/list", False),
        ("ftp://keys.example/list", False),
        ("https://", False),
    ],
)
def test_the_key_list_must_use_https(monkeypatch: pytest.MonkeyPatch, place: str, right: bool) -> None:
    monkeypatch.setenv("STRONGROOM_LEAK_KEYS", place)
    if right:
        assert config.load().leak_keys == place
        return
    with pytest.raises(ConfigError, match="STRONGROOM_LEAK_KEYS"):
        config.load()
