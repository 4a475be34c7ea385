"""Key secrets: random, with a checksum, masked, and hashed so that a copy of the store opens nothing."""

from __future__ import annotations

import hashlib
import hmac
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strongroom.errors import StoreError
from strongroom.keys.hasher import (
    HINT_SLOTS,
    Hasher,
    HintRule,
    Imported,
    hint_of_imported,
    imported_hmac,
    imported_sha256,
)
from strongroom.keys.token import (
    ALPHABET,
    MAX_KEY_CHARS,
    PREFIX_PATTERN,
    SCAN_PATTERN,
    checksum,
    generate,
    is_possible,
    masked,
)
from strongroom.pepper import Pepper

prefixes = st.sampled_from(["sr", "acme", "acme_live", "x_1_2"])
KEY = "sr_SR10123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefg"
OLD, NEW = Pepper("000001", b"o" * 32), Pepper("000002", b"n" * 32)
SHA256 = bytes(range(32))


@given(prefixes)
def test_a_generated_key_is_valid_and_found_by_scanners(prefix: str) -> None:
    text = generate(prefix)
    assert re.fullmatch(PREFIX_PATTERN, prefix)
    assert is_possible(text)
    assert re.findall(SCAN_PATTERN, f'token = "{text}";') == [text]
    assert re.fullmatch(rf"{prefix}_SR1[0-9A-Za-z]{{43}}[0-9A-Za-z]{{6}}", text)


def test_keys_are_random() -> None:
    texts = {generate() for _ in range(1_000)}
    assert len(texts) == 1_000
    assert {char for text in texts for char in text[6:49]} == set(ALPHABET)


def test_the_checksum_never_changes() -> None:
    # Keys that were given out must stay recognised by every later version.
    assert checksum(KEY) == "3ooy9o"


@given(prefixes, st.integers(0, 200), st.sampled_from([*ALPHABET, "-", "_", " ", "\n", ".", "é"]))
def test_the_checksum_detects_one_mistyped_character(prefix: str, position: int, char: str) -> None:
    text = generate(prefix)
    position = len(prefix) + 4 + position % 49  # behind the mark
    wrong = text[:position] + char + text[position + 1 :]
    assert is_possible(wrong) == (wrong == text)


@given(st.integers(1, 48), st.sampled_from(["\n", " ", "x", "é", "\r\n"]))
def test_the_checksum_detects_a_truncated_or_extended_key(removed: int, added: str) -> None:
    text = generate()
    assert not is_possible(text[:-removed])
    assert not is_possible(text + added)
    assert not is_possible(text + text)


def test_the_checksum_detects_swapped_neighbours() -> None:
    text = generate()
    for position in range(6, len(text) - 1):
        swapped = text[:position] + text[position + 1] + text[position] + text[position + 2 :]
        assert is_possible(swapped) == (swapped == text)


@pytest.mark.parametrize(
    ("text", "possible"),
    [
        ("sk-proj-abc.def/ghi+jkl==", True),  # imported keys look like anything
        ("schlüssel", True),
        ("x" * MAX_KEY_CHARS, True),
        ("x" * (MAX_KEY_CHARS + 1), False),
        ("", False),
        ("a\x00b", False),
        ("a\nb", False),
        ("\ud800", False),
    ],
)
def test_texts_without_our_format_may_be_imported_keys(text: str, possible: bool) -> None:
    assert is_possible(text) is possible


@given(st.one_of(st.builds(generate, prefixes), st.text(max_size=100)))
def test_a_masked_key_shows_only_its_beginning_and_end(text: str) -> None:
    mask = masked(text)
    assert "…" in mask
    if is_possible(text) and re.fullmatch(SCAN_PATTERN, text):
        prefix = text.rpartition("_")[0]
        assert mask == f"{prefix}_SR1{text[len(prefix) + 4 :][:4]}…{text[-4:]}"
    else:
        shown = mask.replace("…", "")
        assert len(shown) <= min(8, len(text) // 4)


# --- Hashes ---------------------------------------------------------------------------------------------------


def test_a_hash_depends_on_secret_and_pepper_and_shows_neither() -> None:
    text = generate()
    hash = Hasher([OLD]).hash(text)
    assert re.fullmatch(r"000001:[0-9a-f]{64}", hash)
    assert hash != Hasher([Pepper("000001", b"x" * 32)]).hash(text)
    assert hash != Hasher([OLD]).hash(generate())
    assert text not in hash


def test_a_hash_of_an_older_pepper_is_still_a_candidate_and_not_current() -> None:
    text = generate()
    before, after = Hasher([OLD]), Hasher([NEW, OLD])
    assert before.hash(text) in after.candidates(text)
    assert after.candidates(text)[0] == after.hash(text)
    assert before.is_current(before.hash(text))
    assert not after.is_current(before.hash(text))


def test_an_imported_sha256_is_a_candidate_in_any_case() -> None:
    hasher = Hasher([NEW])
    digest = "2CF24DBA5FB0A30E26E83B2AC5B9E29E1B161E5C1FA7425E73043362938B9824"
    assert imported_sha256(digest) in hasher.candidates("hello")
    assert hasher.hash_of(bytes.fromhex(digest)) == hasher.hash("hello")


def test_peppers_with_a_common_name_prefix_are_distinguished() -> None:
    assert not Hasher([Pepper("1", b"x" * 32)]).is_current("12:00")


def test_a_sealed_text_opens_only_under_its_pepper() -> None:
    sealed = Hasher([OLD]).seal(SHA256)
    assert SHA256 not in sealed
    assert Hasher([NEW, OLD]).unseal(sealed) == SHA256
    assert Hasher([OLD]).seal(SHA256) != sealed
    for hasher in (Hasher([NEW]), Hasher([Pepper("000001", b"x" * 32)])):
        with pytest.raises(StoreError, match="pepper"):
            hasher.unseal(sealed)


@given(st.one_of(st.binary(max_size=80), st.binary(max_size=80).map(lambda rest: b"000001:" + rest)))
def test_garbage_does_not_unseal(garbage: bytes) -> None:
    with pytest.raises(StoreError):
        Hasher([OLD]).unseal(garbage)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_an_altered_sealed_text_does_not_open(position: int, flip: int) -> None:
    sealed = bytearray(Hasher([OLD]).seal(SHA256))
    sealed[position % len(sealed)] ^= flip
    with pytest.raises(StoreError):
        Hasher([OLD]).unseal(bytes(sealed))


# --- Hashes of other systems ------------------------------------------------------------------------------------


def test_a_secret_is_looked_up_under_every_unsalted_hash() -> None:
    secrets = {"1": b"their secret"}
    candidates = Hasher([NEW, OLD], Imported(secrets)).candidates("hello")
    assert candidates[2:] == [
        imported_sha256(hashlib.sha256(b"hello").hexdigest()),
        "sha512:" + hashlib.sha512(b"hello").hexdigest(),
        imported_hmac("1", hmac.digest(b"their secret", b"hello", "sha256").hex()),
    ]
    assert "their secret" not in repr(Imported(secrets))


@given(st.text(max_size=20), st.integers(0, 12))
def test_a_hint_matches_every_secret_that_starts_with_it(text: str, chars: int) -> None:
    rules = (HintRule(), HintRule(chars))
    hints = Hasher([NEW], Imported(rules=rules)).hints(text)
    assert len(set(hints)) == len(hints) == HINT_SLOTS * (("." in text) + (len(text) >= chars))
    for stored in hints:
        rule, hint = hint_of_imported(stored) or (None, "")
        assert rule in rules
        assert text.startswith(hint)
        assert rule == HintRule(chars) or text[len(hint)] == "."
    assert not set(hints) & set(Hasher([NEW]).candidates(text))


def test_a_text_sealed_for_one_purpose_does_not_open_for_another() -> None:
    hasher = Hasher([OLD])
    sealed = hasher.seal(b"their secret", "imported secret")
    assert hasher.unseal(sealed, "imported secret") == b"their secret"
    with pytest.raises(StoreError, match="a sealed hash cannot be opened"):
        hasher.unseal(sealed)
    assert b"o" * 32 not in repr(OLD).encode()
