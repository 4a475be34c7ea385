"""Signed notes: the published examples verify, what was changed does not, and bad texts are refused with a sentence."""

from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa

from strongroom.journal.signed_note import (
    COSIGNATURE,
    ED25519,
    ML_DSA_44,
    Checkpoint,
    NoteError,
    Signature,
    SignedNote,
    VerifierKey,
    keys_of,
    signed_message,
)

CHECKPOINT = Checkpoint("log.example/1", 5, bytes(range(32)))


def signed(algorithm: int, name: str = "log.example/1") -> tuple[SignedNote, VerifierKey]:
    """The checkpoint, signed with a new key."""
    private: ed25519.Ed25519PrivateKey | mldsa.MLDSA44PrivateKey
    private = mldsa.MLDSA44PrivateKey.generate() if algorithm == ML_DSA_44 else ed25519.Ed25519PrivateKey.generate()
    key = VerifierKey(name, algorithm, private.public_key().public_bytes_raw())
    time = b"" if algorithm == ED25519 else (1_700_000_000).to_bytes(8, "big")
    content = time + private.sign(signed_message(algorithm, name, CHECKPOINT.text, 1_700_000_000))
    return SignedNote(CHECKPOINT.text, (Signature(name, key.id, content),)), key


def test_the_published_example_of_a_key_and_a_note_verifies() -> None:
    """The example of the C2SP signed-note format."""
    key = VerifierKey.parse("PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW")
    note = SignedNote.parse(
        "If you think cryptography is the answer to your problem,\n"
        "then you don't know what your problem is.\n"
        "\n"
        "— PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n"
    )
    assert note.signers([key]) == ([key], [])


@pytest.mark.parametrize("algorithm", [ED25519, COSIGNATURE, ML_DSA_44])
def test_a_signature_is_of_this_text_and_this_key(algorithm: int) -> None:
    note, key = signed(algorithm)
    assert SignedNote.parse(str(note)) == note
    assert note.signers([key]) == ([key], [])
    assert VerifierKey.parse(str(key)) == key
    other = SignedNote(Checkpoint("log.example/1", 6, CHECKPOINT.root).text, note.signatures)
    assert other.signers([key]) == ([], [key])
    assert note.signers([signed(algorithm)[1]]) == ([], [])  # another key of this name has another id
    assert Checkpoint.parse(note.text) == CHECKPOINT


def test_a_file_of_keys_has_comments_and_empty_lines() -> None:
    _, key = signed(ML_DSA_44)
    assert keys_of(f"# of our log\n\n{key}\n") == [key]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "no signed note"),
        ("a\n5\nroot\n", "no signed note"),
        ("a\n5\nroot\n\nno signature\n", "expected a signature line"),
        ("a\n5\nroot\n\n— name\n", "expected a signature line"),
        ("a\n5\nroot\n\n— name !!!!\n", "expected a signature line"),
        ("a\n5\nroot\n\n" + "— a AAAAAAAA\n" * 65, "at most 64"),
        ("a" * 300_000 + "\n\n", "more than"),
    ],
)
def test_what_is_no_note_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(NoteError, match=sentence):
        SignedNote.parse(text)


@pytest.mark.parametrize(
    "text",
    ["a\n", "a\n05\n" + "A" * 43 + "=\n", "a\n-1\nAAAA\n", "a\n5\nAAAA\n", "\n5\n" + "A" * 43 + "=\n", "a\n\n\n"],
)
def test_what_is_no_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(NoteError, match="found"):
        Checkpoint.parse(text)


@pytest.mark.parametrize("change", ["", "x", "name", "name+00000000+AA==", "a b+00000000+AA=="])
def test_what_is_no_key_is_refused(change: str) -> None:
    with pytest.raises(NoteError, match="found"):
        VerifierKey.parse(change)


def test_a_key_that_was_changed_is_refused() -> None:
    _, key = signed(ED25519)
    content = base64.b64encode(b"\x01" + bytes(32)).decode()
    with pytest.raises(NoteError, match="cut or changed"):
        VerifierKey.parse(f"{key.name}+{key.id.hex()}+{content}")
