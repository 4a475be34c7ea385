"""Hashes of other systems: parsed as those systems wrote them, compared exactly, refused with a reason otherwise."""

from __future__ import annotations

import base64
import hashlib
import hmac
import importlib.util
import re
import sys
import time
from contextlib import suppress

import bcrypt
import pytest
from cryptography.hazmat.primitives.kdf.argon2 import Argon2d, Argon2i, Argon2id
from django.contrib.auth.hashers import (
    BCryptPasswordHasher,
    BCryptSHA256PasswordHasher,
    PBKDF2PasswordHasher,
    PBKDF2SHA1PasswordHasher,
)
from hypothesis import given
from hypothesis import strategies as st
from rest_framework_api_key.crypto import KeyGenerator

from strongroom.errors import ConfigError
from strongroom.keys.foreign_hash import is_slow, matches, parsed_hash, sha256_of

texts = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=60)
salts = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
TEXT = "abcdefgh.0123456789abcdefghijklmnopqrstuv"
SHA256 = hashlib.sha256(TEXT.encode()).digest()
SHA512 = hashlib.sha512(TEXT.encode()).digest()
BCRYPT_SALT = b"$2b$04$abcdefghijklmnopqrstuu"
ARGON2ID = Argon2id(salt=b"somesalt", length=32, iterations=1, lanes=1, memory_cost=64).derive_phc_encoded(
    TEXT.encode()
)


# --- Digests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        SHA256.hex(),
        SHA256.hex().upper(),
        "sha256:" + SHA256.hex(),
        "sha256$$" + SHA256.hex(),
        "sha256-" + base64.b64encode(SHA256).decode(),
        "sha256:" + base64.urlsafe_b64encode(SHA256).decode().rstrip("="),
        base64.b64encode(SHA256).decode(),
        base64.urlsafe_b64encode(SHA256).decode().rstrip("="),
    ],
)
def test_sha256_is_read_in_hex_and_base64(form: str) -> None:
    found = parsed_hash(form)
    assert (found.kind, found.text, found.is_digest) == ("sha256", "sha256:" + SHA256.hex(), True)
    assert sha256_of(found) == SHA256


@pytest.mark.parametrize(
    "form",
    [SHA512.hex(), "sha512:" + SHA512.hex().upper(), "sha512-" + base64.b64encode(SHA512).decode()],
)
def test_sha512_is_read_in_hex_and_base64(form: str) -> None:
    found = parsed_hash(form)
    assert (found.kind, found.text, sha256_of(found)) == ("sha512", "sha512:" + SHA512.hex(), None)


def test_djangorestframework_api_key_3_hashes_are_the_sha512_of_the_secret() -> None:
    text, prefix, hashed = KeyGenerator().generate()
    found = parsed_hash(hashed)
    assert found.text == "sha512:" + hashlib.sha512(text.encode()).hexdigest()
    assert text.partition(".")[0] == prefix


@pytest.mark.parametrize("encode", [bytes.hex, lambda raw: base64.b64encode(raw).decode()])
@pytest.mark.parametrize("scheme", ["hmac-sha256:", "hmac_sha256$"])
def test_an_hmac_is_read_in_hex_and_base64(scheme: str, encode: object) -> None:
    made = hmac.digest(b"their secret", TEXT.encode(), "sha256")
    assert callable(encode)
    assert parsed_hash(scheme + encode(made)).text == "hmac-sha256:" + made.hex()


# --- Verifiers, as the real libraries make them -------------------------------------------------------------------


@given(texts, salts.filter(lambda salt: "$" not in salt))
def test_djangos_pbkdf2_hashes_match_only_their_secret(text: str, salt: str) -> None:
    for hasher in (PBKDF2PasswordHasher(), PBKDF2SHA1PasswordHasher()):
        encoded = hasher.encode(text, salt, iterations=3)
        verifier = parsed_hash(encoded)
        assert (verifier.kind, verifier.text, verifier.is_digest) == ("pbkdf2", encoded, False)
        assert matches(verifier.text, text)
        for other in (text + "x", text[:-1], "x" + text[1:]):
            assert matches(verifier.text, other) == (other == text) == hasher.verify(other, encoded)


@given(st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=18))
def test_djangos_bcrypt_hashes_match_only_their_secret(text: str) -> None:
    for hasher in (BCryptSHA256PasswordHasher(), BCryptPasswordHasher()):
        encoded = hasher.encode(text, BCRYPT_SALT)
        verifier = parsed_hash(encoded).text
        assert matches(verifier, text)
        assert not matches(verifier, text + "x")
        assert parsed_hash(verifier).text == verifier


@pytest.mark.parametrize("variant", ["a", "b", "y"])
def test_every_sound_bcrypt_variant_is_supported(variant: str) -> None:
    made = bcrypt.hashpw(TEXT.encode(), BCRYPT_SALT).decode()
    verifier = parsed_hash(made.replace("$2b$", f"$2{variant}$")).text
    assert matches(verifier, TEXT)
    assert not matches(verifier, TEXT + "x")


def test_bcrypt_compares_the_first_72_bytes_as_the_original_system_did() -> None:
    text = "k" * 90
    verifier = parsed_hash(bcrypt.hashpw(text.encode()[:72], BCRYPT_SALT).decode()).text
    assert matches(verifier, text)
    assert matches(verifier, "k" * 72 + "else")
    assert not matches(verifier, "k" * 71)
    # Django's other hasher was made to avoid that.
    whole = parsed_hash(BCryptSHA256PasswordHasher().encode(text, BCRYPT_SALT)).text
    assert matches(whole, text)
    assert not matches(whole, "k" * 72)


def test_a_character_cut_by_the_72nd_byte_is_no_error() -> None:
    text = "k" * 71 + "éé"
    verifier = parsed_hash(bcrypt.hashpw(text.encode()[:72], BCRYPT_SALT).decode()).text
    assert matches(verifier, text)


@pytest.mark.parametrize(
    "published",
    [
        # From the tests of Argon2's reference implementation: "password", "somesalt", t=2, m=65536, p=1, version 0x13.
        "$argon2i$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$wWKIMhR9lyDFvRz9YTZweHKfbftvj+qf+YFY4NeBbtA",
        "$argon2id$v=19$m=65536,t=2,p=1$c29tZXNhbHQ$CTFhFdXPJO1aFaMaO6Mm5c8y7cJHAph8ArZWb2GRPPc",
    ],
)
def test_argon2s_published_vectors_match(published: str) -> None:
    for form in (published, "argon2" + published):  # as Django writes it
        verifier = parsed_hash(form)
        assert (verifier.kind, verifier.text) == ("argon2", published)
        assert matches(verifier.text, "password")
        assert not matches(verifier.text, "Password")


@pytest.mark.parametrize("variant", [Argon2i, Argon2d, Argon2id])
@given(text=texts)
def test_every_argon2_variant_matches_only_its_secret(
    variant: type[Argon2i] | type[Argon2d] | type[Argon2id], text: str
) -> None:
    made = variant(salt=b"12345678", length=16, iterations=1, lanes=2, memory_cost=16)
    verifier = parsed_hash(made.derive_phc_encoded(text.encode())).text
    assert matches(verifier, text)
    assert not matches(verifier, text + "x")


@given(texts, salts)
def test_salted_sha256_accepts_the_salt_before_or_after_the_secret(text: str, salt: str) -> None:
    before = hashlib.sha256((salt + text).encode())
    after = hashlib.sha256((text + salt).encode())
    for form in (before.hexdigest(), base64.b64encode(before.digest()).decode()):
        verifier = parsed_hash(f"sha256${salt}${form}")
        assert (verifier.kind, verifier.is_digest) == ("salted-sha256", False)
        assert matches(verifier.text, text)
        assert not matches(verifier.text, text + "x")
    suffixed = parsed_hash(f"sha256_suffix${salt}${after.hexdigest()}").text
    assert matches(suffixed, text)
    assert not matches(suffixed, text + "x")


def test_only_microsecond_hashes_count_as_fast() -> None:
    slow = [
        PBKDF2PasswordHasher().encode(TEXT, "salt", 1_000),
        bcrypt.hashpw(TEXT.encode(), BCRYPT_SALT).decode(),
        BCryptSHA256PasswordHasher().encode(TEXT, BCRYPT_SALT),
        ARGON2ID,
    ]
    assert all(is_slow(parsed_hash(form).text) for form in slow)
    assert not is_slow(parsed_hash(f"sha256$salt${SHA256.hex()}").text)
    began = time.process_time()
    for _ in range(100):
        matches(f"sha256$salt${SHA256.hex()}", TEXT)
    assert time.process_time() - began < 0.1


# --- What is refused ----------------------------------------------------------------------------------------------

B53 = "a" * 53
B64 = base64.b64encode(SHA256).decode()


@pytest.mark.parametrize(
    ("form", "problem"),
    [
        ("", "found a text of 0 characters, expected SHA-256"),
        ("hunter2", "found a text of 7 characters, expected SHA-256"),
        ("5f4dcc3b5aa765d61d8327deb882cf99", "found a text of 32 characters"),  # MD5
        ("md5$salt$5f4dcc3b5aa765d61d8327deb882cf99", "found md5$…, expected SHA-256"),
        ("scrypt$16384$salt$8$5$" + B64, "found scrypt$…, expected"),
        ("$1$salt$hash", "found $1$…, expected"),
        ("x" * 513, "found 513 characters, expected at most 512"),
        ("sha256:abc", "found 3 characters after the scheme, expected 32 bytes"),
        ("sha512$$" + "0" * 127, "found 127 characters after the scheme, expected 64 bytes"),
        ("hmac-sha256:" + "0" * 63, "found 63 characters after the scheme, expected 32 bytes"),
        ("sha256:" + "A" * 42 + "B", "found base64 that is damaged at its end"),
        ("sha256$salt$" + "0" * 63, "found 63 characters after the scheme"),
        ("sha256$salt", "found a salted SHA-256 in another form"),
        ("pbkdf2_sha256$x$salt$" + B64, "found PBKDF2 in another form"),
        ("pbkdf2_sha512$10$salt$" + B64, "found PBKDF2 in another form"),
        ("pbkdf2_sha256$0$salt$" + B64, "found 0 iterations, expected 1 to 4000000"),
        ("pbkdf2_sha256$4000001$salt$" + B64, "found 4000001 iterations"),
        ("pbkdf2_sha256$10$salt$" + B64[:20], "found a digest of 15 bytes, expected 32"),
        ("pbkdf2_sha256$10$salt$" + B64.rstrip("="), "expected 32 in base64 with its padding"),
        ("pbkdf2_sha1$10$salt$" + B64, "found a digest of 32 bytes, expected 20"),
        ("$2x$10$" + B53, "found $2x$"),
        ("$2b$10$" + B53[1:], "found bcrypt in another form"),
        ("$2b$31$" + B53, "found the cost 31, expected 4 to 15"),
        ("bcrypt$$2b$03$" + B53, "found the cost 03, expected 4 to 15"),
        ("$argon2id$m=64,t=1,p=1$c29tZXNhbHQ$" + "A" * 43, "found Argon2 without a version"),
        ("$argon2id$v=16$m=64,t=1,p=1$c29tZXNhbHQ$" + "A" * 43, "found Argon2 v=16, expected v=19"),
        ("$argon2id$v=19$m=4194304,t=1,p=1$c29tZXNhbHQ$" + "A" * 43, "found m=4194304, expected 8 to 262144"),
        ("$argon2id$v=19$m=64,t=99,p=1$c29tZXNhbHQ$" + "A" * 43, "found t=99, expected 1 to 16"),
        ("$argon2id$v=19$m=262144,t=5,p=1$c29tZXNhbHQ$" + "A" * 43, "found m=262144 and t=5, expected a product"),
        ("$argon2id$v=19$m=64,t=1,p=0$c29tZXNhbHQ$" + "A" * 43, "found p=0, expected 1 to 16"),
        ("$argon2id$v=19$m=64,t=1,p=1$c29tZQ$" + "A" * 43, "too short"),
        ("$argon2id$v=19$m=64,t=1,p=1$c29tZXNhbHQ$" + "A" * 42 + "B", "found base64 that is damaged"),
        ("$argon2xx$v=19$m=64,t=1,p=1$c29tZXNhbHQ$" + "A" * 43, "found Argon2 in another form"),
    ],
)  # fmt: skip
def test_a_hash_that_cannot_be_compared_is_refused_with_the_reason(form: str, problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        parsed_hash(form)


def _of_each_kind() -> list[str]:
    return [
        f"sha256$salt${SHA256.hex()}",
        PBKDF2PasswordHasher().encode(TEXT, "salt", 2),
        PBKDF2SHA1PasswordHasher().encode(TEXT, "salt", 2),
        BCryptSHA256PasswordHasher().encode(TEXT, BCRYPT_SALT),
        bcrypt.hashpw(TEXT.encode(), BCRYPT_SALT).decode(),
        ARGON2ID,
        "hmac-sha256:" + SHA256.hex(),
        "sha512$$" + SHA512.hex(),
    ]


@given(st.sampled_from(_of_each_kind()), st.integers(0, 200), st.text(max_size=2))
def test_a_mutated_hash_is_refused_or_compared_without_an_error(form: str, position: int, put: str) -> None:
    position %= len(form)
    altered = form[:position] + put + form[position + 1 :]
    found = None
    with suppress(ValueError):
        found = parsed_hash(altered)
    if found is not None:
        assert parsed_hash(found.text) == found  # what is kept is understood again
        if not found.is_digest and "$2" not in found.text:  # an altered cost of bcrypt takes seconds
            assert matches(found.text, "another text") is False


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused_without_showing_it(form: str) -> None:
    said = ""
    try:
        parsed_hash(form)
    except ValueError as error:
        said = str(error)
    assert len(form) < 24 or form not in said


def test_a_hash_is_not_in_its_repr() -> None:
    assert SHA256.hex() not in repr(parsed_hash(SHA256.hex()))


def test_bcrypt_without_its_package_is_refused_at_the_import_and_explained_at_a_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    verifier = bcrypt.hashpw(TEXT.encode(), BCRYPT_SALT).decode()
    monkeypatch.setitem(sys.modules, "bcrypt", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"strongroom\[hashes\]"):
        parsed_hash(verifier)
    with pytest.raises(ConfigError, match=r"strongroom\[hashes\]"):
        matches(verifier, TEXT)
