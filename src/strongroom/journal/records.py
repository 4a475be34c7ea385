"""Journal records: the actor, the change with its values before and after, the time and the request. Secrets are
masked. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from ..context import SALT_BYTES, TOKEN, Context, new_salt, next_id
from ..entities import Collection, Document
from ..storage import tagged_json
from ..storage.port import Record

MASK = "***"
DENY = "deny"
"""The action of a record of refused calls."""
CHANGES = frozenset({"create", "update", "delete", "expire"})
"""The actions of records of changes of a document."""
MAX_ATTEMPTED_BYTES = 8_192
"""The most that the record of a denial says of the document that a call would have written, in bytes of JSON."""
MAX_CLAIMS_BYTES = 4_096
"""The claims of a token that a record keeps, as JSON. Of a larger token the first claims of FIRST_CLAIMS are kept, then
those that fit, by name."""
FIRST_CLAIMS = ("iss", "sub", "aud", "exp", "iat", "jti", "azp", "client_id")
LEFT_OUT = "strongroom:left_out"
"""In the kept claims of a larger token: how many others it had."""

_encode = msgspec.json.Encoder().encode


def document_after(record: Record, before: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A document after a record, for a reader that follows it in memory. `before`: the document before it, as far as
    the reader knows it, because an update records the changed fields alone. None if the record, one of CHANGES, removed
    it."""
    if record.action == "update":
        return {**(before or {}), **(record.after or {})}
    return dict(record.after or {}) if record.action == "create" else None


def change_record(
    context: Context,
    action: str,
    collection: Collection,
    entity_id: str,
    before: Document | None,
    after: Document | None,
) -> Record:
    """The record of one change; `after` has declared fields only.

    Create and delete record the whole document. An update records the changed fields, and the fields by which cached
    lists are found, because a node that reads the record must know which lists to forget.
    """
    secrets = collection.secrets
    if before is None:
        pass
    elif after is None:
        before = masked(collection, before)
    else:
        lists = {listed.by for listed in collection.cached.lists} if collection.cached is not None else ()
        changed = [name for name in after if name in lists or name not in before or before[name] != after[name]]
        before = _hidden(secrets, {name: before.get(name) for name in changed})
        after = {name: after[name] for name in changed}
    return Record(
        next_id(),
        context.tenant,
        context.now_us,
        context.actor,
        context.request_id,
        action,
        collection.name,
        entity_id,
        before,
        None if after is None else _hidden(secrets, after),
        salt=new_salt(),
        claims=token_claims(context),
    )


def denial_record(
    context: Context,
    operation: str,
    collection: str,
    entity_id: str,
    reason: str,
    *,
    count: int = 1,
    asked: str | None = None,
    attempted: Document | None = None,
) -> Record:
    """The record of a call that the rules refused, or of `count` equal calls, of which it is the last. `asked`: the
    tenant that the call named, if the record does not belong to that tenant. `attempted`: `attempted_fields`."""
    after: Document = {"operation": operation, "reason": reason}
    if count > 1:
        after["count"] = count
    if asked is not None:
        after["tenant"] = asked
    if attempted is not None:
        after["attempted"] = attempted
    return Record(
        id=next_id(),
        tenant=context.tenant,
        at_us=context.now_us,
        actor=context.actor,
        request_id=context.request_id,
        action=DENY,
        collection=collection,
        entity_id=entity_id,
        after=after,
        salt=new_salt(),
        claims=token_claims(context),
    )


def attempted_fields(collection: Collection, before: Document | None, after: Document | None) -> Document | None:
    """The fields that a refused call would have written, secrets masked, with at most MAX_ATTEMPTED_BYTES of JSON. A
    value that does not fit is replaced by a text with its length."""
    if after is None:
        return None
    changed = {name: after[name] for name in after if before is None or before.get(name) != after[name]}
    room = MAX_ATTEMPTED_BYTES
    found: Document = {}
    for name, value in (masked(collection, changed) or {}).items():
        size = len(name) + len(tagged_json.quick_dumps(value).encode())
        if size > room:
            value = f"({size - len(name)} bytes were left out)"
            size = len(name) + len(value)
            if size > room:
                break
        found[name] = value
        room -= size
    return found


def token_claims(context: Context) -> Document | None:
    """The claims of the caller's token, as a record keeps them; None for a caller without a token."""
    token = context.claims.get(TOKEN)
    if token is None:
        return None
    claims = dict(token)
    if len(_encode(claims)) <= MAX_CLAIMS_BYTES:
        return claims
    names = [*(name for name in FIRST_CLAIMS if name in claims), *sorted(claims.keys() - set(FIRST_CLAIMS))]
    kept: Document = {}
    left = MAX_CLAIMS_BYTES - len(_encode({LEFT_OUT: len(names)}))
    for name in names:
        size = len(_encode({name: claims[name]}))
        if size <= left:
            kept[name] = claims[name]
            left -= size
    return {**kept, LEFT_OUT: len(names) - len(kept)}


def is_redacted(record: Record) -> bool:
    """Whether a record was redacted: then it does not say what was changed."""
    return len(record.salt) > SALT_BYTES


def masked(collection: Collection, document: Document | None) -> Document | None:
    """The declared fields of a document, with `***` for every secret that is set."""
    if document is None:
        return None
    fields = collection.fields
    return _hidden(collection.secrets, {name: value for name, value in document.items() if name in fields})


def _hidden(secrets: frozenset[str], fields: Document) -> Document:
    """The fields, with `***` for every secret that is set."""
    if not secrets:
        return fields
    return {name: MASK if name in secrets and value is not None else value for name, value in fields.items()}
