"""The floor of `verify`: a bare ASGI endpoint that hashes, looks up and answers, and keeps no count of anything."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

Message = dict[str, Any]

KEYS_VARIABLE = "BENCH_BARE_KEYS"


def answer_for(number: int) -> dict[str, Any]:
    """An answer of the shape and about the size of Strongroom's."""
    return {
        "valid": True,
        "code": "VALID",
        "key_id": f"key_{number:032x}",
        "tenant": "bench",
        "user_id": None,
        "permissions": [],
        "metadata": {},
        "limits": [
            {
                "resource": "tokens",
                "limit": 1_000_000_000_000,
                "used": 250_000 + number,
                "remaining": 999_999_750_000 - number,
                "recorded": 250_000 + number,
                "reserved": 0,
                "leased": 0,
                "window": {"kind": "rolling", "seconds": 18_000},
                "resets_at": "2030-01-01T00:00:00.000000Z",
            }
        ],
        "retry_after_s": None,
        "message": None,
    }


def _load() -> dict[bytes, dict[str, Any]]:
    keys = json.loads(Path(os.environ[KEYS_VARIABLE]).read_text())
    return {sha256(key.encode()).digest(): answer_for(number) for number, key in enumerate(keys)}


class Bare:
    """POST anything: `{"key": …}` in, the answer out. Nothing is checked but that the key is known."""

    def __init__(self) -> None:
        self._answers = _load()

    async def __call__(
        self,
        scope: Message,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        body = b""
        while True:
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        key = json.loads(body)["key"]
        found = self._answers.get(sha256(key.encode()).digest(), {"valid": False})
        answer = json.dumps(found, separators=(",", ":")).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": answer})


def create() -> Bare:
    """What uvicorn calls (`--factory`)."""
    return Bare()
