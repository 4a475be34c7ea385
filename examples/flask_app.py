"""A Flask application with keys, permissions and limits, in threads.

python examples/flask_app.py, then with the key that it prints:
curl -i -H "Authorization: Bearer $KEY" 'http://127.0.0.1:8000/words?n=5'
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from flask import Flask, Response, request

from strongroom.integrations.flask import ApiKeys

STORE = os.environ.get("STORE", "sqlite:///example.db")
PORT = int(os.environ.get("PORT", "8000"))

app = Flask(__name__)
keys = ApiKeys(app, url=STORE)


@app.get("/me")
@keys.required(permission="chat:read")
def me() -> dict[str, Any]:
    answer = keys.verification
    return {"key": answer.key_id, "tenant": answer.tenant, "user": answer.user_id}


@app.get("/words")
@keys.required(permission="chat:read")
def words() -> Response:
    """Streams words, and charges the sent words."""
    count = request.args.get("n", 3, int)
    hold = keys.reserve(cost={"tokens": 100}).open()

    def parts() -> Iterator[str]:
        for number in range(count):
            hold.use(tokens=1)
            yield f"word {number} "

    return Response(parts(), mimetype="text/plain")


def make_key() -> str:
    issued = keys.room.call(
        lambda room: room.keys.create(
            name="demo",
            user_id="u1",
            permissions=["chat:*"],
            limits=[
                {"resource": "requests", "limit": 3, "window": {"kind": "rolling", "seconds": 60}},
                {"resource": "tokens", "limit": 1_000, "window": {"kind": "calendar", "unit": "day"}},
            ],
        )
    )
    return issued.text


if __name__ == "__main__":
    print("key:", make_key(), flush=True)
    app.run(port=PORT, threaded=True)
