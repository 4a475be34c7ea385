"""Flask, and the blocking facade below it: keys verified from threads over one event loop in its own thread."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, request
from flask.testing import FlaskClient

from strongroom import IssuedKey
from strongroom.blocking import BlockingStrongroom
from strongroom.errors import ConfigError, InvalidInput, NotFound, Unavailable
from strongroom.integrations.flask import ApiKeys
from tests.helpers.asgi_calls import REQUESTS, bearer, fields
from tests.helpers.asgi_calls import check_refusal as check
from tests.helpers.waiting import PATIENCE_S


@pytest.fixture
def room(tmp_path: Path) -> Iterator[BlockingStrongroom]:
    with BlockingStrongroom(f"sqlite:///{tmp_path}/a.db") as room:
        yield room


def make(room: BlockingStrongroom, **given: Any) -> IssuedKey:
    return room.call(lambda inner: inner.keys.create(name="k", **given))


def check_refusal(answer: Any, status: int, code: str) -> dict[str, Any]:
    answer.content = answer.data
    return check(answer, status, code)


def flask(**settings: Any) -> tuple[FlaskClient, ApiKeys]:
    app = Flask(__name__)
    keys = ApiKeys(app, **settings)

    @app.post("/chat/<int:id>")
    @keys.required(permission="chat:write", cost=lambda: {"requests": 1, "tokens": int(request.args.get("n", 1))})
    def chat(id: int) -> dict[str, Any]:
        return {"user": keys.verification.user_id, "id": id}

    @app.get("/later")
    @keys.required()
    async def later() -> dict[str, Any]:
        await asyncio.sleep(0)
        return {"user": keys.verification.user_id}

    @app.get("/open")
    def open_to_all() -> dict[str, Any]:
        return {}

    below = Blueprint("below", __name__, url_prefix="/below")

    @below.get("/any")
    def any_key() -> dict[str, Any]:
        return {"key": keys.verification.key_id}

    @below.get("/one")
    @keys.required(permission="chat:write")
    def one() -> dict[str, Any]:
        return {"key": keys.verification.key_id}

    @below.get("/free")
    def free() -> dict[str, Any]:
        return {}

    keys.protect(below, exempt=["/below/free"])
    app.register_blueprint(below)
    return app.test_client(), keys


# --- Flask ------------------------------------------------------------------------------------------------------


def test_a_view_is_called_only_with_a_valid_key(room: BlockingStrongroom) -> None:
    good = make(room, user_id="u1", permissions=["chat:write"], limits=[REQUESTS])
    reader = make(room, permissions=["chat:read"])
    http, _ = flask(room=room)
    check_refusal(http.post("/chat/3"), 401, "unauthenticated")
    check_refusal(http.post("/chat/3", headers=bearer("x")), 401, "not_found")
    check_refusal(http.post("/chat/3", headers=bearer(reader.text)), 403, "insufficient_permissions")
    answers = [http.post("/chat/3?n=7", headers=bearer(good.text)) for _ in range(3)]
    assert answers[0].json == {"user": "u1", "id": 3}
    assert fields(answers[0].headers["RateLimit"])["requests-rolling-3600"]["r"] == 1
    check_refusal(answers[2], 429, "rate_limited")
    stats = room.call(lambda inner: inner.keys.stats(good.key.id))
    assert stats.totals == {"requests": 2, "tokens": 14}


def test_async_views_are_protected_and_public_views_need_no_key(room: BlockingStrongroom) -> None:
    issued = make(room, user_id="u1")
    http, keys = flask(room=room)
    assert http.get("/later", headers=bearer(issued.text)).json == {"user": "u1"}
    check_refusal(http.get("/later"), 401, "unauthenticated")
    assert http.get("/open").status_code == 200
    with Flask(__name__).test_request_context(), pytest.raises(LookupError):
        keys.verification  # noqa: B018 - asking is what raises


def test_a_blueprint_is_protected_except_exempt_paths_and_charges_once(room: BlockingStrongroom) -> None:
    issued = make(room, permissions=["chat:write"])
    http, _ = flask(room=room)
    check_refusal(http.get("/below/any"), 401, "unauthenticated")
    assert http.get("/below/free").status_code == 200
    for path in ("/below/any", "/below/one"):
        assert http.get(path, headers=bearer(issued.text)).json == {"key": issued.key.id}
    room.close()  # writes what waits
    assert room.call(lambda inner: inner.keys.stats(issued.key.id)).count == 2


def test_a_route_is_named_by_its_rule(room: BlockingStrongroom) -> None:
    chat = make(room, permissions=["chat:*"], allowed_routes=["POST /chat/<int:id>"])
    http, _ = flask(room=room)
    assert http.post("/chat/3", headers=bearer(chat.text)).status_code == 200
    check_refusal(http.get("/later", headers=bearer(chat.text)), 403, "insufficient_permissions")


def test_a_forwarded_address_is_trusted_from_listed_proxies_only(room: BlockingStrongroom) -> None:
    issued = make(room, allowed_ips=["203.0.113.0/24"])
    headers = {**bearer(issued.text), "x-forwarded-for": "198.51.100.1, 203.0.113.9"}
    trusting, _ = flask(room=room, trusted_proxies=["127.0.0.0/8"])
    assert trusting.get("/later", headers=headers).status_code == 200
    careful, _ = flask(room=room)
    check_refusal(careful.get("/later", headers=headers), 403, "forbidden")


def test_an_invalid_option_is_refused_where_it_is_declared(room: BlockingStrongroom) -> None:
    with pytest.raises(ConfigError, match="neither"):
        ApiKeys()
    with pytest.raises(ConfigError, match="cache"):
        ApiKeys(room=room, cache="memory://")
    with pytest.raises(InvalidInput, match="header"):
        ApiKeys(room=room, header="no good")
    with pytest.raises(InvalidInput, match="tokens"):
        ApiKeys(room=room).required(cost={"tokens": -1})


# --- The facade -------------------------------------------------------------------------------------------------


def test_threads_share_one_exact_limit(room: BlockingStrongroom) -> None:
    issued = make(room, limits=[{**REQUESTS, "limit": 50}])
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: room.verify(issued.text).valid, range(120)))
    assert sum(answers) == 50


def test_concurrent_threads_open_the_store_once(tmp_path: Path) -> None:
    room = BlockingStrongroom(f"sqlite:///{tmp_path}/a.db")
    try:
        with ThreadPoolExecutor(8) as pool:
            issued = list(pool.map(lambda _: make(room).key.id, range(16)))
        assert len(set(issued)) == 16
        assert sum(thread.name == "strongroom" for thread in threading.enumerate()) == 1
    finally:
        room.close()


def test_errors_reach_the_thread_unchanged(room: BlockingStrongroom, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        room.call(lambda inner: inner.keys.get("key_nothing"))
    with pytest.raises(ConfigError):
        BlockingStrongroom("nonsense://x").open()
    hasty = BlockingStrongroom(f"sqlite:///{tmp_path}/b.db", timeout_s=0.05)
    with hasty, pytest.raises(Unavailable, match="no answer within"):
        hasty.call(lambda _: _asleep())
    with pytest.raises(TimeoutError):  # the work's own is not taken for ours
        room.call(lambda _: _timing_out())


async def _asleep() -> None:
    await asyncio.Event().wait()


async def _timing_out() -> None:
    raise TimeoutError("its own")


def test_closing_waits_for_running_calls_and_the_store_can_reopen(room: BlockingStrongroom) -> None:
    issued = make(room, limits=[REQUESTS])
    entered, go = threading.Event(), threading.Event()

    async def slow() -> bool:
        entered.set()
        await asyncio.to_thread(go.wait, 10)
        return True

    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(room.call, lambda _: slow())
        assert entered.wait(PATIENCE_S)
        closing = pool.submit(room.close)
        go.set()
        assert waiting.result(10) is True
        closing.result(10)
    assert not any(thread.name == "strongroom" for thread in threading.enumerate())
    assert room.verify(issued.text).valid


async def test_the_facade_can_be_awaited_from_another_event_loop(room: BlockingStrongroom) -> None:
    issued = await room.acall(lambda inner: inner.keys.create(name="k", limits=[{**REQUESTS, "limit": 10}]))
    answers = await asyncio.gather(*(room.acall(lambda inner: inner.keys.verify(issued.text)) for _ in range(25)))
    assert sum(answer.valid for answer in answers) == 10


def test_a_forked_process_does_not_use_its_parents_store(room: BlockingStrongroom) -> None:
    issued = make(room)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # nothing of pytest may run here
        try:
            room.verify(issued.text)
        except ConfigError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    said = os.read(read, 1_000).decode()
    os.close(read)
    assert "open it in each worker" in said
    assert room.verify(issued.text).valid
