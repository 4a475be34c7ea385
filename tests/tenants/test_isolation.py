"""The scenarios of seed 003, section 8, that belong to tenants, on every store."""

from __future__ import annotations

import pytest

from strongroom import Entity, Strongroom
from strongroom.context import system_context
from strongroom.entities import Query, Where
from strongroom.errors import Denied, InvalidInput, NotFound
from strongroom.storage.firestore.store import FirestoreStore
from strongroom.storage.port import unwrapped
from strongroom.tenants import CloudAccount, Configuration, Role, ServiceAccount, Tenant, User
from tests.helpers.servers import firestore

OF_A_TENANT: list[Entity] = [
    User(id="x", email="ann@example.com"),
    ServiceAccount(id="x", name="importer"),
    Role(id="x", scopes=["read"]),
    Configuration(id="x", value={"code": "EUR"}),
    CloudAccount(id="x", provider="aws", account_id="123456789012", credentials="s3cret"),
]


async def test_bdd_12_14_04_documents_are_read_with_tenant_isolation(url: str) -> None:
    async with Strongroom.open(url) as room:
        acme, other = room.tenant("acme"), room.tenant("other")
        bound = room.tenant("acme", actor="user:eve", claims={"tenant": "other", "admin": True})
        for entity in OF_A_TENANT:
            cls = type(entity)
            made = await acme.create(entity)
            assert (await acme.get(cls, "x")).version == made.version
            assert await other.get_or_none(cls, "x") is None
            assert (await other.find(cls)).items == []
            assert (await other.find(cls, Query(Where("id", "==", "x")))).items == []
            with pytest.raises(NotFound):
                await other.delete(cls, "x")
            with pytest.raises(Denied):
                await bound.get(cls, "x")
            with pytest.raises(Denied):
                await bound.find(cls)
            await other.create(entity)  # the same id and the same unique values, in another tenant


async def test_firestore_collections_are_created_with_the_tenant_hierarchy(request: pytest.FixtureRequest) -> None:
    """Seed 003, section 8.1: `/tenants/{tenant_id}/…`."""
    async with Strongroom.open(firestore.urls(firestore.start(request))()) as room:
        store = unwrapped(room.store)
        assert isinstance(store, FirestoreStore)
        for entity in OF_A_TENANT:
            await room.tenant("acme").create(entity)
            path = f"{store.paths.documents}/tenants/acme/{entity.__collection__.name}/x"
            assert await store.wire.get(path) is not None


async def test_the_platforms_record_of_a_tenant_is_apart_from_the_tenants_documents(url: str) -> None:
    async with Strongroom.open(url) as room:
        await room.tenant("acme").create(User(id="acme", email="ann@example.com"))
        assert await room.database.get_or_none(system_context(), Tenant, "acme") is None
        for name in ("acme", "a/b", "..", "__x__", "ünïcode 日本"):
            await room.database.create(system_context(), Tenant(id=name, name=f"{name}!"))
            assert (await room.database.get(system_context(), Tenant, name)).name == f"{name}!"
        found = (await room.database.find(system_context(), Tenant, Query(order_by=("id",)))).items
        assert {tenant.id for tenant in found} == {"acme", "a/b", "..", "__x__", "ünïcode 日本"}
        assert await room.store.tenants() == ["acme"]
        with pytest.raises(Denied):
            await room.tenant("acme").get(Tenant, "acme")


async def test_schema_validation_rejects_invalid_payloads_with_detailed_errors_on_a_write(url: str) -> None:
    """Seed 003, section 8.1."""
    async with Strongroom.open(url) as room:
        acme = room.tenant("acme")
        user = await acme.create(User(email="ann@example.com"))
        with pytest.raises(InvalidInput) as refused:
            await acme.update(User, user.id, {"email": "no", "status": "gone", "roles": ["1"], "age": 5})
        assert [problem.path for problem in refused.value.problems] == ["age", "email", "status", "roles.0"]
        assert (await acme.get(User, user.id)) == user, "nothing was changed"
