"""Import sources: the HMAC secrets and the hint rules of the systems that a store's keys were imported from."""

from __future__ import annotations

import hmac
import logging
from typing import Annotated

from ..context import Context, system_context
from ..database import Database
from ..entities import Entity, Query, Secret
from ..errors import AlreadyExists, InvalidInput, Problem, StoreError
from .hasher import MAX_HINT_CHARS, Hasher, HintRule, Imported

NAME = "key_sources"
MAX_SECRETS = 8
MAX_RULES = 4
"""The most secrets and rules of a store: each makes the look-up of an unknown secret longer."""
MAX_SECRET_BYTES = 4_096
_PURPOSE = "imported secret"
_HMAC = "hmac-"
_RULE = "hint-"

_log = logging.getLogger(__name__)


class KeySource(Entity, collection=NAME, scope="global"):
    """`hmac-<number>`: the HMAC secret of another system, encrypted under the pepper. `hint-dot`, `hint-<number>`: a
    rule that finds keys whose hash has a salt (`hasher.HintRule`)."""

    sealed: Annotated[bytes | None, Secret()] = None


async def load(database: Database, hasher: Hasher) -> Imported:
    """The import sources of a store. A secret whose pepper is not configured any more is left out, with a warning: keys
    that were not used since their import are then not found."""
    secrets: dict[str, bytes] = {}
    rules: list[HintRule] = []
    query = Query(order_by=("id",), limit=MAX_SECRETS + MAX_RULES)
    for source in (await database.find(system_context(), KeySource, query, fresh=True)).items:
        if source.id.startswith(_RULE):
            name = source.id.removeprefix(_RULE)
            rules.append(HintRule(None if name == "dot" else int(name)))
        elif source.sealed is not None:
            try:
                secrets[source.id.removeprefix(_HMAC)] = hasher.unseal(source.sealed, _PURPOSE)
            except StoreError as error:
                _log.warning("the imported secret %s cannot be used: %s", source.id, error)
    return Imported(secrets, tuple(rules))


async def add_rule(database: Database, imported: Imported, rule: HintRule, context: Context) -> Imported:
    """Add a rule, unless the store has it. Raises InvalidInput if there are too many."""
    if rule in imported.rules:
        return imported
    if rule.chars is not None and not 0 <= rule.chars <= MAX_HINT_CHARS:
        raise InvalidInput([Problem("hint", f"found {rule.chars} characters, expected at most {MAX_HINT_CHARS}")])
    if len(imported.rules) >= MAX_RULES:
        raise InvalidInput([Problem("hint", f"found another form of hint, expected {MAX_RULES} at most")])
    await _create(database, KeySource(id=_RULE + rule.id), context)
    return Imported(imported.secrets, (*imported.rules, rule))


async def add_secret(
    database: Database, hasher: Hasher, imported: Imported, secret: bytes, context: Context
) -> tuple[Imported, str]:
    """Add a secret, unless the store has it, and give its id. Raises InvalidInput if it is invalid or one too many."""
    if (there := secret_id(imported, secret)) is not None:
        return imported, there
    if not 1 <= len(secret) <= MAX_SECRET_BYTES:
        raise InvalidInput([Problem("hmac_secret", f"found {len(secret)} bytes, expected 1 to {MAX_SECRET_BYTES}")])
    if len(imported.secrets) >= MAX_SECRETS:
        raise InvalidInput([Problem("hmac_secret", f"found another secret, expected at most {MAX_SECRETS} in a store")])
    for number in range(1, MAX_SECRETS + 1):
        id = str(number)
        if id in imported.secrets:
            continue
        source = KeySource(id=_HMAC + id, sealed=hasher.seal(secret, _PURPOSE))
        if await _create(database, source, context):
            return Imported({**imported.secrets, id: secret}, imported.rules), id
    raise InvalidInput([Problem("hmac_secret", "other secrets are there whose pepper is not configured any more")])


def secret_id(imported: Imported, secret: bytes) -> str | None:
    """The id of a secret; None if the store does not have it."""
    return next((id for id, known in imported.secrets.items() if hmac.compare_digest(known, secret)), None)


async def _create(database: Database, source: KeySource, context: Context) -> bool:
    """Whether the source was created; False if it existed."""
    try:
        await database.create(Context(None, context.actor, context.claims), source)
    except AlreadyExists:
        return False
    return True
