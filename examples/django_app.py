"""A Django project in one file, with sync and async views that need an API key; it is served as ASGI.

python examples/django_app.py, then with the key that it prints:
curl -i -H "Authorization: Bearer $KEY" http://127.0.0.1:8000/notes/7/
"""

from __future__ import annotations

import os
import sys
from typing import Any

import django
import uvicorn
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import JsonResponse
from django.urls import path

from strongroom.blocking import BlockingStrongroom
from strongroom.integrations.django import api_key, public, verification_of

STORE = os.environ.get("STORE", "sqlite:///example.db")
PORT = int(os.environ.get("PORT", "8000"))

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],
    MIDDLEWARE=["strongroom.integrations.django.StrongroomMiddleware"],
    ROOT_URLCONF=sys.modules[__name__],
    SECRET_KEY=os.environ.get("DJANGO_SECRET_KEY", "only-for-the-example"),
    STRONGROOM={"url": STORE},
)
django.setup()


def me(request: Any) -> Any:
    """No decorator: any valid key is admitted."""
    answer = verification_of(request)
    return JsonResponse({"key": answer.key_id, "user": answer.user_id})


@api_key(permission="notes:read", cost={"requests": 1, "tokens": 5})
async def note(request: Any, id: int) -> Any:
    return JsonResponse({"note": id, "user": verification_of(request).user_id})


@public
def healthz(request: Any) -> Any:
    return JsonResponse({"alive": True})


urlpatterns = [path("me/", me), path("notes/<int:id>/", note), path("healthz/", healthz)]


def make_key() -> str:
    with BlockingStrongroom(STORE) as room:
        issued = room.call(
            lambda inner: inner.keys.create(
                name="demo",
                user_id="u1",
                permissions=["notes:*"],
                limits=[
                    {"resource": "requests", "limit": 3, "window": {"kind": "rolling", "seconds": 60}},
                    {"resource": "tokens", "limit": 1_000, "window": {"kind": "calendar", "unit": "day"}},
                ],
            )
        )
    return issued.text


if __name__ == "__main__":
    print("key:", make_key(), flush=True)
    uvicorn.run(get_asgi_application(), port=PORT, log_level="warning")
