"""How the command line shows keys, their statistics and verifications."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from . import output, shortforms
from .limitviews import limit_texts, print_limits

if TYPE_CHECKING:
    from ..keys import ApiKey, IssuedKey, KeyStats, Verification

ONCE = "Keep this secret now: it is not stored and cannot be shown again."


def key_view(key: ApiKey) -> dict[str, Any]:
    """A key as JSON, as over HTTP: everything except its hashes."""
    return key.shown()


def stats_view(found: KeyStats) -> dict[str, Any]:
    """A key's statistics as JSON, as over HTTP."""
    return {
        "key_id": found.key.id,
        "tenant": found.key.tenant,
        "enabled": found.key.enabled,
        "expired": found.expired,
        "count": found.count,
        "last_used_at": found.last_used_at,
        "totals": found.totals,
        "limits": found.limits,
    }


def print_issued(issued: IssuedKey, json: bool) -> None:
    if json:
        output.print_json({**key_view(issued.key), "key": issued.text or None})
        return
    if issued.text:
        output.print_secret("key", issued.text, ONCE, lambda: print_key(issued.key, json))
    else:
        print_key(issued.key, json)
        output.print_note(f"The new secret waits to be claimed: strongroom keys claim {issued.key.id}")


def print_key(key: ApiKey, json: bool) -> None:
    if json:
        output.print_json(key_view(key))
        return
    fields = [
        ("id", key.id),
        ("tenant", key.tenant),
        ("name", key.name),
        ("shown as", key.display),
        ("state", state_of(key, datetime.now(UTC))),
        ("user", key.user_id or ""),
        ("owner", key.owner or ""),
        ("for", key.description or ""),
        ("environment", key.environment),
        ("permissions", " ".join(key.permissions)),
        ("limits", limit_texts(key.limits)),
        ("groups", " ".join(key.groups)),
        ("models", " ".join(key.allowed_models)),
        ("routes", " ".join(key.allowed_routes)),
        ("addresses", " ".join(key.allowed_ips)),
        ("metadata", str(key.metadata) if key.metadata else ""),
        ("created", output.moment(key.created_at)),
        ("changed", output.moment(key.updated_at)),
        ("expires", output.moment(key.expires_at)),
        ("last used", output.moment(key.last_used)),
        ("uses", str(key.usage_count)),
        ("old secret until", output.moment(key.previous_until, "")),
        ("rotated", _schedule(key)),
        ("next rotation", output.moment(key.next_rotation_at, "")),
        ("new secret", "waits to be claimed" if key.unclaimed is not None else ""),
        ("found in public", output.moment(key.leaked_at, "")),
        ("deleted", output.moment(key.deleted_at, "")),
    ]
    output.print_fields(fields)


def print_answer(answer: Verification, json: bool) -> None:
    if json:
        output.print_json(answer)
        return
    fields = [
        ("code", answer.code),
        ("why", answer.message or ""),
        ("id", answer.key_id or ""),
        ("tenant", answer.tenant or ""),
        ("user", answer.user_id or ""),
        ("permissions", " ".join(answer.permissions)),
        ("retry after", f"{answer.retry_after_s:.3f} s" if answer.retry_after_s is not None else ""),
    ]
    output.print_fields(fields)
    print_limits(answer.limits)


def _schedule(key: ApiKey) -> str:
    """The period of rotations, and how long the old secret then works."""
    if key.rotate_every_s is None:
        return ""
    every = f"every {shortforms.show_seconds(key.rotate_every_s)}"
    if key.rotation_overlap_s is None:
        return every
    return f"{every}, the old secret works for {shortforms.show_seconds(key.rotation_overlap_s)}"


def state_of(key: ApiKey, now: datetime) -> str:
    if key.deleted_at is not None:
        return "deleted"
    return "disabled" if not key.enabled else "expired" if key.is_expired(now) else "active"
