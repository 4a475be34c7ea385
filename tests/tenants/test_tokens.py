"""Tokens: which are accepted, and that no hostile one is."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from datetime import MAXYEAR
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from joserfc.jwk import OctKey, RSAKey

from strongroom.context import utc_from_us
from strongroom.errors import Unauthenticated
from strongroom.keys import generate
from strongroom.tenants import TokenSettings, is_token
from strongroom.tenants.jwks import ALGORITHMS, Jwks
from strongroom.tenants.tokens import MAX_TOKEN_BYTES, MAX_TOKEN_ROLES, Tokens, VerifiedToken
from tests.helpers.issuer import AUDIENCE, ISSUER, claims, encoded, key_of, public, signed

NOW = 2_000_000_000
KEY = key_of("RS256")
PEM = cast(RSAKey, KEY).as_pem(private=False)
HEADER = {"alg": "RS256", "kid": "k1"}
LEEWAY_S = 60


class StillClock:
    def __init__(self) -> None:
        self.us = NOW * 1_000_000

    def now_us(self) -> int:
        return self.us


def tokens(*keys: dict[str, Any], clock: StillClock | None = None, **more: Any) -> Tokens:
    """A verifier that knows these keys (default: KEY)."""
    jwks = Jwks("/nowhere")
    jwks._use(json.dumps({"keys": list(keys) or [public(KEY)]}).encode())
    jwks._error = None
    settings = TokenSettings(**{"issuer": ISSUER, "audiences": (AUDIENCE, "other"), "jwks": "/nowhere", **more})
    return Tokens(settings, jwks, clock or StillClock())


async def verified(text: str, **more: Any) -> VerifiedToken:
    return await tokens(**more).verify(text)


async def why(text: str, **more: Any) -> str:
    """Why a token is refused."""
    with pytest.raises(Unauthenticated) as caught:
        await tokens(**more).verify(text)
    assert caught.value.details["token"] is True
    return caught.value.message


def good(header: Any = None, **more: Any) -> str:
    return signed({**HEADER, **(header or {})}, claims(NOW, **more), KEY)


# --- Good tokens ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [name for names in ALGORITHMS.values() for name in names])
async def test_a_token_of_each_accepted_algorithm_is_verified(algorithm: str) -> None:
    key = key_of(algorithm)
    text = signed({"alg": algorithm, "kid": "k1"}, claims(NOW, roles=["a", "b"]), key, algorithm)
    assert is_token(text)
    found = await tokens(public(key)).verify(text)
    assert (found.subject, found.tenant, found.roles) == ("ann", "acme", ("a", "b"))
    assert found.expires_us == (NOW + 600 + LEEWAY_S) * 1_000_000
    assert found.claims["iss"] == ISSUER
    head, body, end = text.split(".")
    for broken in (
        f"{head}.{body}.{end[:-8]}AAAAAAAA",
        f"{head}.{body}.{end[:-4]}",
        f"{head}.{encoded(claims(NOW, tenant='globex'))}.{end}",
        f"{encoded({'alg': algorithm, 'kid': 'k1', 'x': 1})}.{body}.{end}",
    ):
        with pytest.raises(Unauthenticated, match="signature is not by a key"):
            await tokens(public(key)).verify(broken)


@pytest.mark.parametrize(
    ("claim", "value", "roles"),
    [
        ("roles", ["a", "b", "a"], ("a", "b")),
        ("roles", "a b", ("a", "b")),
        ("roles", ["a", 1, None, "", "no spaces here", "x" * 65, "é", "../a", "a"], ("a",)),
        ("roles", [], ()),
        ("roles", None, ()),
        ("realm_access.roles", {"roles": ["a"]}, ("a",)),
        ("https://acme.example/roles", ["a"], ("a",)),
    ],
)
async def test_roles_are_read_from_the_configured_claim(claim: str, value: Any, roles: tuple[str, ...]) -> None:
    name = claim if "/" in claim else claim.partition(".")[0]
    assert (await verified(good(**{name: value}), roles_claim=claim)).roles == roles


async def test_the_tenant_is_read_from_the_configured_claim() -> None:
    assert (await verified(good(org={"id": "globex"}), tenant_claim="org.id")).tenant == "globex"
    assert "no claim 'org.id'" in await why(good(**{"org.id": "globex"}), tenant_claim="org.id")
    assert "no claim 'org.id'" in await why(good(org="globex"), tenant_claim="org.id")


async def test_one_of_several_audiences_is_enough() -> None:
    for audience in ("other", ["x", AUDIENCE], [1, "other"]):
        assert (await verified(good(aud=audience))).subject == "ann"


async def test_a_token_works_to_the_last_microsecond_of_its_leeway() -> None:
    clock = StillClock()
    text = good(exp=NOW)
    clock.us = (NOW + LEEWAY_S) * 1_000_000 - 1
    assert (await verified(text, clock=clock)).expires_us == clock.us + 1
    clock.us += 1
    assert await why(text, clock=clock) == "the token has expired"
    clock.us += 1_000_000
    assert await why(text, clock=clock) == "the token has expired"
    assert await why(good(exp=NOW - LEEWAY_S)) == "the token has expired"
    assert await why(good(exp=NOW), leeway_s=0) == "the token has expired"
    for name in ("nbf", "iat"):
        assert (await verified(good(**{name: NOW + LEEWAY_S}))).subject == "ann"
        assert f"{name!r} is in the future" in await why(good(**{name: NOW + LEEWAY_S + 0.001}))


# --- Hostile tokens -------------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[Callable[[], str], str]] = {
    "not signed": (lambda: signed({"alg": "none"}, claims(NOW), None), "algorithm 'none'"),
    "without its signature": (lambda: signed(HEADER, claims(NOW), None), "signature is missing"),
    "not signed, with a signature": (lambda: signed({**HEADER, "alg": "none"}, claims(NOW), KEY), "algorithm 'none'"),
    "not signed, in other letters": (lambda: signed({**HEADER, "alg": "NonE"}, claims(NOW), KEY), "algorithm 'NonE'"),
    "the public key as an HMAC secret": (lambda: signed({**HEADER, "alg": "HS256"}, claims(NOW), PEM), "'HS256'"),
    "the same, said to be RSA": (lambda: signed(HEADER, claims(NOW), PEM), "signature"),
    "RSA said to be ECDSA": (lambda: signed({**HEADER, "alg": "ES256"}, claims(NOW), KEY), "no key with the id"),
    "another algorithm of the same key": (lambda: signed({**HEADER, "alg": "PS256"}, claims(NOW), KEY), "signature"),
    "no algorithm": (lambda: signed({"kid": "k1"}, claims(NOW), KEY), "algorithm 'None'"),
    "an algorithm that is no text": (lambda: signed({**HEADER, "alg": ["RS256"]}, claims(NOW), KEY), "algorithm"),
    "another key with a known id": (lambda: signed(HEADER, claims(NOW), key_of("RS256", "k2")), "not by a key"),
    "a kid that is a path": (lambda: good({"kid": "../../etc/passwd"}), "no key with the id '../../etc/passwd'"),
    "a kid that is SQL": (lambda: good({"kid": "' OR 1=1; --"}), "no key with the id"),
    "a kid of 10 KB": (lambda: good({"kid": "k" * 10_240}), "at most 8192"),
    "a kid of 4 KB": (lambda: good({"kid": "k" * 4_096}), "key id is not a text"),
    "a kid that is an object": (lambda: good({"kid": {"k1": 1}}), "key id is not a text"),
    "a kid with U+0000": (lambda: good({"kid": "k1\0"}), "key id is not a text"),
    "a critical header": (lambda: good({"crit": ["exp"], "exp": 1}), "'crit'"),
    "a critical header that is empty": (lambda: good({"crit": []}), "'crit'"),
    "an unencoded payload": (lambda: good({"b64": False}), "'b64'"),
    "a compressed payload": (lambda: good({"zip": "DEF"}), "'zip'"),
    "an encryption": (lambda: good({"enc": "A256GCM"}), "'enc'"),
    "a nested token": (lambda: signed({**HEADER, "cty": "JWT"}, good().encode(), KEY), "cty"),
    "a nested token without saying so": (lambda: signed(HEADER, good().encode(), KEY), "content is not a JSON object"),
    "an encrypted token": (lambda: f"{encoded({'alg': 'RSA-OAEP', 'enc': 'A256GCM'})}.a.b.c.d", "encrypted"),
    "a logout token": (lambda: good({"typ": "logout+jwt"}), "typ 'logout+jwt'"),
    "a proof of possession": (lambda: good({"typ": "dpop+jwt"}), "typ"),
    "another issuer": (lambda: good(iss="https://evil.example"), "another issuer"),
    "an issuer that begins alike": (lambda: good(iss=f"{ISSUER}.evil.example"), "another issuer"),
    "an issuer among others": (lambda: good(iss=[ISSUER]), "another issuer"),
    "no issuer": (lambda: good(iss=None), "another issuer"),
    "another audience": (lambda: good(aud="strongroom2"), "another audience"),
    "an audience that is a part": (lambda: good(aud="strong"), "another audience"),
    "an audience as an object": (lambda: good(aud={AUDIENCE: 1}), "another audience"),
    "no audience": (lambda: good(aud=None), "another audience"),
    "bound to its holder's key": (lambda: good(cnf={"jkt": "x"}), "'cnf'"),
    "expired": (lambda: good(exp=NOW - LEEWAY_S - 1), "expired"),
    "never expiring": (lambda: good(exp=None), "never expire"),
    "expiring as a text": (lambda: good(exp=str(NOW + 600)), "'exp': found text"),
    "expiring as true": (lambda: good(exp=True), "'exp': found a boolean"),
    "not yet valid": (lambda: good(nbf=NOW + LEEWAY_S + 1), "'nbf' is in the future"),
    "issued in the future": (lambda: good(iat=NOW + LEEWAY_S + 1), "'iat' is in the future"),
    "of every tenant": (lambda: good(tenant="*"), "no token may name"),
    "of no tenant": (lambda: good(tenant=None), "no claim 'tenant'"),
    "of several tenants": (lambda: good(tenant=["acme", "globex"]), "found a list"),
    "of a tenant with U+0000": (lambda: good(tenant="acme\0"), "U+0000"),
    "of a tenant with a space": (lambda: good(tenant=" acme"), "no spaces"),
    "of a tenant with a long name": (lambda: good(tenant="a" * 129), "at most 128"),
    "of a tenant written in another way": (lambda: good(tenant="caf\u0065\u0301"), "NFC"),
    "of nobody": (lambda: good(sub=None), "'sub'"),
    "of an empty name": (lambda: good(sub=""), "'sub'"),
    "of a number": (lambda: good(sub=7), "'sub'"),
    "of a name with a line break": (lambda: good(sub="ann\nkey:admin"), "control character"),
    "of a long name": (lambda: good(sub="a" * 256), "'sub'"),
    "roles as a number": (lambda: good(roles=7), "expected a list of texts"),
    "too many roles": (lambda: good(roles=[f"r{n}" for n in range(MAX_TOKEN_ROLES + 1)]), "at most 100"),
    "repeated claims": (
        lambda: signed(HEADER, json.dumps(claims(NOW)).replace("{", '{"tenant": "globex", ', 1).encode(), KEY),
        "distinct names",
    ),
    "a repeated algorithm": (lambda: signed(b'{"alg":"none","kid":"k1","alg":"RS256"}', claims(NOW), KEY), "distinct"),
    "claims that are a list": (lambda: signed(HEADER, [claims(NOW)], KEY), "JSON object"),
    "claims that are no JSON": (lambda: signed(HEADER, b"\xff\xfe", KEY), "JSON object"),
    "claims with NaN": (lambda: signed(HEADER, b'{"exp": NaN}', KEY), "JSON object"),
    "claims nested without end": (lambda: signed(HEADER, b'{"a":' * 900 + b"1" + b"}" * 900, KEY), "at most 16 levels"),
    "claims nested deeper than the bound": (lambda: good(a=json.loads("[" * 16 + "]" * 16)), "at most 16 levels"),
    "oversized": (lambda: good(more="x" * MAX_TOKEN_BYTES), "at most 8192"),
    "with spaces in its signature": (lambda: good()[:-4] + "====", "not base64url"),
    "in base64 of another alphabet": (lambda: "/".join(good().rsplit("_", 1)), "base64url"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "expected"), HOSTILE.values(), ids=list(HOSTILE))
async def test_a_hostile_token_is_refused_with_its_reason(make: Callable[[], str], expected: str) -> None:
    text = make()
    assert expected in await why(text)
    assert is_token(text), "it would be looked up as a key"


async def test_keys_and_addresses_in_a_token_are_ignored() -> None:
    """`jwk`, `jku`, `x5u` and `x5c` name the key of whoever made the token."""
    theirs = key_of("RS256", "k2")
    for more in (
        {"jwk": public(theirs)},
        {"jku": "https://evil.example/jwks.json"},
        {"x5u": "https://evil.example/cert.pem"},
        {"x5c": ["MIIB"]},
    ):
        forged = signed({**HEADER, **more}, claims(NOW), theirs)
        assert "not by a key of the issuer" in await why(forged)
        assert (await verified(good(more))).subject == "ann", "a good token with such a header is still good"


async def test_a_symmetric_key_in_the_jwks_verifies_nothing() -> None:
    secret = OctKey.generate_key(256)
    text = signed({"alg": "HS256", "kid": "s"}, claims(NOW), secret.raw_value)
    both = tokens(public(KEY), {**secret.as_dict(private=True), "kid": "s"})
    with pytest.raises(Unauthenticated, match="found the algorithm 'HS256'"):
        await both.verify(text)


async def test_a_key_verifies_only_what_it_is_published_for() -> None:
    for more in ({"use": "enc"}, {"key_ops": ["encrypt"]}, {"alg": "PS256"}):
        other = public(key_of("ES256", "e"))
        with pytest.raises(Unauthenticated, match="no key with the id"):
            await tokens(public(KEY, **more), other).verify(good())
    assert (await tokens(public(KEY, use="sig", key_ops=["verify"], alg="RS256")).verify(good())).subject == "ann"


async def test_a_token_without_a_key_id_is_tried_with_each_key_that_fits() -> None:
    keys = [public(key_of("ES256", "e")), public(key_of("RS256", "k2")), public(KEY)]
    assert (await tokens(*keys).verify(signed({"alg": "RS256"}, claims(NOW), KEY))).subject == "ann"


async def test_keys_with_one_id_are_each_tried() -> None:
    twice = [public(key_of("RS256", "k2"), kid="k1"), public(KEY), public(key_of("ES256"), kid="k1")]
    assert (await tokens(*twice).verify(good())).subject == "ann"


# --- Laws -----------------------------------------------------------------------------------------------------

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)


@given(name=st.sampled_from(["alg", "kid", "typ", "crit", "jku", "x", "cty"]), value=_JSON)
async def test_no_header_makes_the_verifier_fail_in_another_way(name: str, value: Any) -> None:
    with suppress(Unauthenticated):
        await verified(signed({**HEADER, name: value}, claims(NOW), KEY))


@given(name=st.sampled_from(["iss", "aud", "exp", "nbf", "iat", "sub", "tenant", "roles", "x"]), value=_JSON)
async def test_no_claim_makes_the_verifier_fail_in_another_way(name: str, value: Any) -> None:
    try:
        found = await verified(signed(HEADER, {**claims(NOW), name: value}, KEY))
    except Unauthenticated:
        return
    assert found.tenant != "*"
    assert found.expires_us > NOW * 1_000_000
    assert utc_from_us(found.expires_us).year <= MAXYEAR


@given(text=st.text(alphabet="eyJhbGciOiJSUzI1NiJ9.-_ é", max_size=60))
async def test_no_text_makes_the_verifier_fail_in_another_way(text: str) -> None:
    is_token(text)
    with pytest.raises(Unauthenticated):
        await verified(text)


def test_a_secret_of_strongroom_never_has_the_form_of_a_token() -> None:
    assert not any(is_token(generate()) for _ in range(1_000))
    for text in ("", ".", "..", "a.b.c", "eyJ.x.y", "an administrator's key", "x" * 600):
        assert not is_token(text)
