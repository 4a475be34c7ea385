"""`GET /stats`: a key's statistics for the holder of the key, in the shape of seed 004's service."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from fastapi import APIRouter, Request, Response
from pydantic import BaseModel

from ...context import us_from_utc, utc_from_us
from ...errors import TenantSuspended, Unauthenticated
from ...keys import KeyStats
from ...limits import calendar_span
from ..auth import authorization, bearer
from ..wire import Json, room_of


class CurrentUsageOut(BaseModel):
    tokens_used_in_current_window: int
    window_started_at: datetime
    window_ends_at: datetime | None
    remaining_tokens: int | None


class StatsOut(BaseModel):
    """The statistics of the key that calls."""

    key: str
    name: str
    model: Any
    token_limit_per_5h: int | None
    expiry_date: datetime | None
    created_at: datetime
    last_used: datetime | None
    is_expired: bool
    current_usage: CurrentUsageOut
    total_lifetime_tokens: int


routes = APIRouter(tags=["stats"])

FIVE_HOURS_S = 18_000


@routes.get("/stats", response_model=StatsOut, summary="Statistics of the key that calls")
async def stats(request: Request) -> Response:
    """The bearer token is the API key itself. Expired keys get an answer too (`is_expired`)."""
    room = room_of(request)
    keys = room.keys
    secret = bearer(authorization(request.scope["headers"]))
    known = await keys.identify(secret) if secret else None
    if known is not None and known.suspended is not None:
        raise TenantSuspended(known.suspended)
    if known is None or not known.enabled:
        raise Unauthenticated("the key is unknown or disabled", token=bool(secret))
    return Json(_as_seed_004(await keys.stats(known.id), utc_from_us(room.clock.now_us())))


def _as_seed_004(stats: KeyStats, now: datetime) -> dict[str, Any]:
    key = stats.key
    tokens = [s for s in stats.limits if s.resource == "tokens"]
    five_hours = [s for s in tokens if s.window.get("seconds") == FIVE_HOURS_S]
    limit = next(iter(five_hours or tokens), None)
    window = limit.window if limit is not None else {"kind": "rolling", "seconds": FIVE_HOURS_S}
    started, ends = _span(window, limit.resets_at if limit is not None else None, now, key.created_at or now)
    return {
        "key": key.display,
        "name": key.name,
        "model": key.metadata.get("model"),
        "token_limit_per_5h": limit.limit if limit is not None else None,
        "expiry_date": key.expires_at,
        "created_at": key.created_at,
        "last_used": stats.last_used_at,
        "is_expired": stats.expired,
        "current_usage": {
            "tokens_used_in_current_window": limit.used if limit is not None else 0,
            "window_started_at": started,
            "window_ends_at": ends,
            "remaining_tokens": limit.remaining if limit is not None else None,
        },
        "total_lifetime_tokens": stats.totals.get("tokens", 0),
    }


def _span(
    window: dict[str, Any], resets_at: datetime | None, now: datetime, created: datetime
) -> tuple[datetime, datetime | None]:
    """The beginning and the end of the current window; for a rolling window, the time of its oldest use and the end of
    that use's effect."""
    match window["kind"]:
        case "rolling" | "anchored":
            length = timedelta(seconds=window["seconds"])
            ends = resets_at if resets_at is not None else now + length
            return min(ends - length, now), ends  # the oldest use counts until its whole bucket has gone
        case "calendar":
            start_us, end_us = calendar_span(window["unit"], ZoneInfo(window["timezone"]), us_from_utc(now))
            return utc_from_us(start_us), utc_from_us(end_us)
        case _:
            return created, None
