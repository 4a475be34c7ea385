"""Bulk load of new keys from records: writes the same documents as single commits, in less time."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from ...context import Context
from ...database import Database
from ...journal import change_record
from ...limits import KeyUsage
from ...storage.port import Append, Create, Pack
from ..model import ApiKey

MIN_LOADED = 100
"""Fewer keys are committed without a bulk load, which needs its own connection."""


async def load(database: Database, context: Context, made: Sequence[tuple[ApiKey, KeyUsage]]) -> bool:
    """Add keys, their journal records and their usages, all or none. False if the database cannot load, or the
    keys are few. Raises Denied, and as `Database.load_packs`."""
    store = database.loading
    if store is None or len(made) < MIN_LOADED:
        return False
    contexts = {key.tenant: Context(key.tenant, context.actor, context.claims) for key, _ in made}
    for own in contexts.values():
        for cls in (ApiKey, KeyUsage):
            await database.authorize(own, "create", cls.__collection__)
    pack = store.packer().pack(_operations(contexts, made))

    async def packs() -> AsyncIterator[Pack]:
        yield pack

    await database.load_packs(next(iter(contexts.values())), ApiKey, packs(), tenants=contexts)
    return True


def _operations(contexts: dict[str, Context], made: Sequence[tuple[ApiKey, KeyUsage]]) -> list[Create | Append]:
    keys, usages = ApiKey.__collection__, KeyUsage.__collection__
    operations: list[Create | Append] = []
    for key, usage in made:
        document = ApiKey.__codec__.encode(key)
        record = change_record(contexts[key.tenant], "create", keys, key.id, None, document)
        operations += (
            Create(keys.name, key.id, document, key.created_at),
            Append(record, len(operations)),
            Create(usages.name, usage.id, KeyUsage.__codec__.encode(usage)),
        )
    return operations
