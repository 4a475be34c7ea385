"""The default policy: a tenant's own data, global collections for administrators, and binding claims."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from strongroom import Context, Entity
from strongroom.rules import Operation, Request, default_policy


class Mine(Entity, collection="mine"):
    text: str


class Shared(Entity, collection="shared", scope="global"):
    text: str


ADMIN = {"admin": True}


@pytest.mark.parametrize("operation", get_args(Operation))
@pytest.mark.parametrize(
    ("entity", "tenant", "claims", "allowed", "reason"),
    [
        (Mine, "acme", {}, True, "own data"),
        (Mine, "acme", {"tenant": "acme"}, True, "own data"),
        (Mine, "acme", {"tenant": "beta"}, False, "belongs to tenant 'beta', not to 'acme'"),
        (Mine, "acme", {"tenant": "beta", **ADMIN}, False, "belongs to tenant 'beta', not to 'acme'"),
        (Mine, "acme", {"tenant": ""}, False, "belongs to tenant ''"),
        (Mine, "acme", ADMIN, True, "own data"),
        (Mine, None, {}, False, "names no tenant"),
        (Mine, None, ADMIN, False, "names no tenant"),
        (Mine, None, {"tenant": "acme"}, False, "belongs to tenant 'acme', not to None"),
        (Shared, "acme", {}, False, "only administrators"),
        (Shared, None, {}, False, "only administrators"),
        (Shared, None, ADMIN, True, "administrator"),
        (Shared, "acme", ADMIN, True, "administrator"),
        (Shared, "acme", {"tenant": "acme", **ADMIN}, True, "administrator"),
        (Shared, "acme", {"tenant": "beta", **ADMIN}, False, "belongs to tenant 'beta'"),
        (Shared, None, {"tenant": "acme", **ADMIN}, False, "belongs to tenant 'acme'"),
        (Shared, None, {"admin": 1}, False, "only administrators"),  # nothing but true is true
        (Shared, None, {"admin": "true"}, False, "only administrators"),
        (Shared, None, {"admin": False}, False, "only administrators"),
    ],
)
def test_the_default_policy_allows_exactly_these_calls(
    operation: Any, entity: type[Entity], tenant: str | None, claims: dict[str, Any], allowed: bool, reason: str
) -> None:
    context = Context(tenant, "user:ada", claims)
    decision = default_policy(Request(context, operation, entity.__collection__, "id"))
    assert decision.allowed is allowed
    assert reason in decision.reason
