"""What a tenant says about a caller with a token: the scopes of its roles, and whether its user is suspended.

Answers are kept in memory for each tenant. The change feed drops them when a role, user or service account of the
tenant changes. If the feed falls behind, they are read again, so that a change acts on every node within a second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from ..cache import SingleFlight
from ..context import system_context, text_problem
from ..database import Database
from ..entities import MAX_ID_BYTES, MAX_IN, Document, Query, Where
from ..journal import ChangeFeed
from ..storage.port import Record
from .model import Role, ServiceAccount, User

MAX_TENANTS = 2_000
MAX_PEOPLE = 20_000
"""Users and service accounts in memory, of all tenants; beyond it everything is dropped and read again."""
MAX_ROLES_KEPT = 200
"""The roles of a tenant with more than this are not kept: those of a token are read for that token."""
MAX_RIGHTS = 500
"""Sets of roles of one tenant whose rights are kept."""
TRUSTED_FOR_S = 0.75
"""An answer is trusted for this time after it was read, or after the change feed was last current."""
SCOPES = frozenset({"read", "write", "admin", "auditor"})
GRANTING = frozenset(cls.__collection__.name for cls in (Role, User, ServiceAccount))
"""The collections that decide what callers with a token may do: over HTTP, administrators alone write them."""
_SUSPENDED = frozenset({"suspended", "disabled"})
_log = logging.getLogger(__name__)


class Grant(msgspec.Struct, frozen=True, gc=False):
    """What a role gives in its tenant."""

    scopes: frozenset[str] = frozenset()
    permissions: frozenset[str] = frozenset()


class Person(msgspec.Struct, frozen=True, gc=False):
    """The user or service account that a token's subject is. `refusal`: why it may do nothing, or None."""

    roles: tuple[str, ...] = ()
    refusal: str | None = None


NOBODY = Person()
"""Of a subject without a document: the token's own roles are all it has."""


class Rights(msgspec.Struct, frozen=True, gc=False):
    """What a caller may do in its tenant: those of its roles that exist there, and what they give together."""

    roles: tuple[str, ...] = ()
    scopes: frozenset[str] = frozenset()
    permissions: tuple[str, ...] = ()


class Access(msgspec.Struct, frozen=True):
    """The tenant's answer about a caller. `refusal`: why it may do nothing, or None. `source.stale`: whether something
    that this was read from has changed since."""

    rights: Rights
    refusal: str | None
    source: _Tenant


class _Tenant:
    """What is known of one tenant. A change makes it stale and takes it out of the cache; a read that was under way
    then completes the stale one, which nobody keeps."""

    __slots__ = ("people", "read_at", "reads", "rights", "roles", "stale")

    def __init__(self) -> None:
        self.stale = False
        self.read_at = time.monotonic()
        self.roles: Mapping[str, Grant] | None = None
        self.people: dict[str, Person] = {}
        self.rights: dict[tuple[str, ...], Rights] = {}
        """What roles give together, by their names: the same few roles come again and again."""
        self.reads: SingleFlight[Any] = SingleFlight()


class Directory:
    """The roles, users and service accounts of one store's tenants. `feed` None: no other process uses the store."""

    def __init__(self, database: Database, feed: ChangeFeed | None = None) -> None:
        self._database = database
        self._feed = feed
        self._tenants: dict[str, _Tenant] = {}
        self._people = 0

    async def access(self, tenant: str, subject: str, roles: tuple[str, ...]) -> Access:
        """What a subject may do that has these roles by its token, and others by its document."""
        known = self._known(tenant)
        person = known.people.get(subject)
        if person is None:
            person = await known.reads.get(("person", subject), 0, lambda: self._person(known, tenant, subject))
        names = tuple(dict.fromkeys((*roles, *person.roles))) if person.roles else roles
        rights = known.rights.get(names)
        if rights is None:
            rights = await self._rights(known, tenant, names)
        return Access(rights, person.refusal, known)

    def _known(self, tenant: str) -> _Tenant:
        known = self._tenants.get(tenant)
        now = time.monotonic()
        heard_at = self._feed.current_at if self._feed is not None else now
        if known is not None and now - max(known.read_at, heard_at) <= TRUSTED_FOR_S:
            return known
        self.forget(tenant)
        if len(self._tenants) >= MAX_TENANTS:
            for oldest in list(self._tenants)[: MAX_TENANTS // 10]:
                self.forget(oldest)
        made = self._tenants[tenant] = _Tenant()
        return made

    # --- Reading ----------------------------------------------------------------------------------------------

    async def _rights(self, known: _Tenant, tenant: str, names: tuple[str, ...]) -> Rights:
        roles = known.roles
        if roles is None and names:
            roles = await known.reads.get("roles", 0, lambda: self._roles(known, tenant))
            if roles is None:
                roles = await self._some_roles(tenant, names)
        found = {name: roles[name] for name in names if name in roles} if roles else {}
        rights = Rights(
            tuple(found),
            frozenset().union(*(grant.scopes for grant in found.values())),
            tuple(sorted(frozenset().union(*(grant.permissions for grant in found.values())))),
        )
        if len(known.rights) >= MAX_RIGHTS:
            known.rights.clear()
        known.rights[names] = rights
        return rights

    async def _roles(self, known: _Tenant, tenant: str) -> Mapping[str, Grant] | None:
        """All roles of a tenant; None if there are too many."""
        query = Query(limit=MAX_ROLES_KEPT + 1)
        found = (await self._database.select(system_context(tenant), Role, query)).items
        if len(found) <= MAX_ROLES_KEPT:
            known.roles = {role["id"]: _grant(tenant, role) for role in found}
        return known.roles

    async def _some_roles(self, tenant: str, names: Sequence[str]) -> Mapping[str, Grant]:
        found: dict[str, Grant] = {}
        for start in range(0, len(names), MAX_IN):
            query = Query(Where("id", "in", names[start : start + MAX_IN]), limit=MAX_IN)
            page = await self._database.select(system_context(tenant), Role, query)
            found.update({role["id"]: _grant(tenant, role) for role in page.items})
        return found

    async def _person(self, known: _Tenant, tenant: str, subject: str) -> Person:
        found = await self._of_subject(tenant, subject)
        if self._people >= MAX_PEOPLE:
            self.forget_all()
        if not known.stale:
            self._people += subject not in known.people
            known.people[subject] = found
        return found

    async def _of_subject(self, tenant: str, subject: str) -> Person:
        context = system_context(tenant)
        by_subject = Query(Where("external_subject", "==", subject), limit=1)
        for cls in (User, ServiceAccount):
            for document in (await self._database.select(context, cls, by_subject)).items:
                return _person_of(document)
        if text_problem(subject, MAX_ID_BYTES) is None:
            by_id = Query(Where("id", "==", subject), limit=1)
            for document in (await self._database.select(context, User, by_id)).items:
                if document["external_subject"] is None:
                    return _person_of(document)
        return NOBODY

    # --- Changes ----------------------------------------------------------------------------------------------

    def seen(self, record: Record) -> None:
        """A journal record of any process: forget what it makes outdated."""
        if record.collection in GRANTING and record.tenant is not None:
            self.forget(record.tenant)

    def forget_all(self) -> None:
        """Changes were missed: read everything again at its next use."""
        for tenant in list(self._tenants):
            self.forget(tenant)

    def forget(self, tenant: str) -> None:
        """Read a tenant again at its next use."""
        known = self._tenants.pop(tenant, None)
        if known is not None:
            known.stale = True
            self._people -= len(known.people)


def _grant(tenant: str, role: Document) -> Grant:
    """What a stored role gives. A scope that this version does not know gives nothing: it must not stop the tenant's
    other roles from working."""
    scopes, permissions = frozenset(_texts(role.get("scopes"))), frozenset(_texts(role.get("permissions")))
    if unknown := scopes - SCOPES:
        _log.warning(
            "the role %.64r of tenant %.128r names unknown scopes, which give nothing: %.200s",
            *(role["id"], tenant, ", ".join(sorted(unknown))),
        )
    return Grant(scopes & SCOPES, permissions)


def _person_of(document: Document) -> Person:
    status = document.get("status")
    refusal = f"the user {document['id']!r} is {status}" if status in _SUSPENDED else None
    return Person(tuple(_texts(document.get("roles"))), refusal)


def _texts(values: Any) -> Iterable[str]:
    return (value for value in values if isinstance(value, str)) if isinstance(values, list | tuple) else ()


__all__ = ["GRANTING", "Access", "Directory", "Rights"]
