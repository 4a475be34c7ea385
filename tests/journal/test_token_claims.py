"""The claims of a token in a journal record: all of them, or those that fit."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from strongroom.context import Context, system_context
from strongroom.journal.records import LEFT_OUT, MAX_CLAIMS_BYTES, denial_record, token_claims

ESSENTIAL = {"iss": "https://issuer.example", "sub": "ann", "aud": "strongroom", "exp": 2_000_000_000}


def context(claims: dict[str, Any]) -> Context:
    return Context("acme", "user:ann", {"scope": "read", "token": MappingProxyType(claims)})


def test_a_record_has_all_claims_of_a_usual_token_and_a_key_has_none() -> None:
    claims = {**ESSENTIAL, "roles": ["a"], "deep": {"x": [1.5, None, True, 2**80]}}
    assert denial_record(context(claims), "get", "policies", "p", "no").claims == claims
    for other in (system_context(), Context("acme", "key:k", {"admin": True})):
        assert token_claims(other) is None


def test_of_a_large_token_the_essential_claims_come_first() -> None:
    groups = [f"group-{number:04}" for number in range(1_000)]
    kept = token_claims(context({"a": "x" * 4_000, "b": 1, "groups": groups, **ESSENTIAL}))
    assert kept == {**ESSENTIAL, "b": 1, LEFT_OUT: 2}


@given(
    st.dictionaries(
        st.text(max_size=40),
        st.text(max_size=3_000) | st.integers() | st.lists(st.text(max_size=40), max_size=40),
        max_size=20,
    )
)
def test_the_kept_claims_are_claims_of_the_token_within_the_bound(claims: dict[str, Any]) -> None:
    kept = dict(token_claims(context(claims)) or {})
    assert len(msgspec.json.encode(kept)) <= MAX_CLAIMS_BYTES
    left = kept.pop(LEFT_OUT, 0)
    assert all(claims[name] == value for name, value in kept.items())
    assert len(kept) + left == len(claims)
