"""Signed notes and checkpoints as C2SP defines them (signed-note, tlog-checkpoint, tlog-cosignature). Pure: no keys are
read or kept here."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256

ED25519 = 0x01
"""A log's signature: of the note's text."""
COSIGNATURE = 0x04
"""A witness's Ed25519 signature: of the text and a time."""
ML_DSA_44 = 0x06
"""An ML-DSA-44 cosignature: of the checkpoint and a time."""
ALGORITHMS = {ED25519: "Ed25519", COSIGNATURE: "Ed25519 cosignature", ML_DSA_44: "ML-DSA-44"}
MAX_NOTE_BYTES = 256 * 1024
MAX_SIGNATURES = 64
MAX_NAME_BYTES = 255
"""A name's length has one byte in the message that ML-DSA-44 signs; so has an origin's."""
_ID_BYTES = 4
_TIME_BYTES = 8
_PUBLIC_BYTES = {ED25519: 32, COSIGNATURE: 32, ML_DSA_44: 1312}
_SIZE = re.compile(r"0|[1-9][0-9]{0,18}")


class NoteError(ValueError):
    """The text is not a signed note, a checkpoint, or a verifier key."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a log commits itself to: its first `size` leaves have this Merkle root."""

    origin: str
    size: int
    root: bytes

    @property
    def text(self) -> str:
        return f"{self.origin}\n{self.size}\n{base64.b64encode(self.root).decode()}\n"

    @classmethod
    def parse(cls, text: str) -> Checkpoint:
        """A checkpoint from a note's text; extension lines are ignored. Raises NoteError."""
        lines = text.split("\n")
        if len(lines) < 4 or not lines[0] or len(lines[0].encode()) > MAX_NAME_BYTES:
            raise NoteError("found no checkpoint, expected lines for the origin, the size and the root")
        if not _SIZE.fullmatch(lines[1]):
            raise NoteError(f"found {lines[1][:40]!r} as the size of a checkpoint, expected a number")
        root = _decoded(lines[2])
        if root is None or len(root) != 32:
            raise NoteError(f"found {lines[2][:60]!r} as the root of a checkpoint, expected 32 bytes in base64")
        return cls(lines[0], int(lines[1]), root)


@dataclass(frozen=True, slots=True)
class VerifierKey:
    """A public key with its name, as `strongroom audit keys` prints it: `name+key id+base64(algorithm, key)`."""

    name: str
    algorithm: int
    public: bytes

    @property
    def id(self) -> bytes:
        return key_id(self.name, self.algorithm, self.public)

    def __str__(self) -> str:
        return f"{self.name}+{self.id.hex()}+{base64.b64encode(bytes([self.algorithm]) + self.public).decode()}"

    @classmethod
    def parse(cls, text: str) -> VerifierKey:
        """Raises NoteError."""
        name, _, rest = text.strip().partition("+")
        id, _, key = rest.partition("+")
        content = _decoded(key)
        if not _is_name(name) or not content:
            raise NoteError(f"found {text[:60]!r}, expected a public key as `strongroom audit keys` prints it")
        algorithm, public = content[0], content[1:]
        if _PUBLIC_BYTES.get(algorithm) != len(public):
            raise NoteError(f"the key {name}: found algorithm {algorithm} with {len(public)} bytes, expected another")
        found = cls(name, algorithm, public)
        if found.id.hex() != id:
            raise NoteError(
                f"the key {name}: found the id {id[:16]!r}, expected {found.id.hex()}: it was cut or changed"
            )
        return found

    def verifies(self, text: str, signature: bytes) -> bool:
        """Whether the signature (without the key id) of a note's text is this key's."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa

        try:
            message = signed_message(self.algorithm, self.name, text, _time_of(self.algorithm, signature))
            if self.algorithm == ML_DSA_44:
                mldsa.MLDSA44PublicKey.from_public_bytes(self.public).verify(signature[_TIME_BYTES:], message)
            else:
                bare = signature if self.algorithm == ED25519 else signature[_TIME_BYTES:]
                ed25519.Ed25519PublicKey.from_public_bytes(self.public).verify(bare, message)
        except (InvalidSignature, ValueError):
            return False
        return True


def keys_of(text: str) -> list[VerifierKey]:
    """The keys of a file, one a line; empty lines and lines that begin with # are left out. Raises NoteError."""
    lines = [line.strip() for line in text.splitlines()]
    return [VerifierKey.parse(line) for line in lines if line and not line.startswith("#")]


def key_id(name: str, algorithm: int, public: bytes) -> bytes:
    return sha256(name.encode() + b"\n" + bytes([algorithm]) + public).digest()[:_ID_BYTES]


def signed_message(algorithm: int, name: str, text: str, time_s: int) -> bytes:
    """What a key of this name signs for a note's text. `time_s`: of a cosignature, else it is not looked at. Raises
    NoteError if the text is no checkpoint and the algorithm signs nothing else."""
    if algorithm == ED25519:
        return text.encode()
    if algorithm == COSIGNATURE:
        return f"cosignature/v1\ntime {time_s}\n{text}".encode()
    checkpoint = Checkpoint.parse(text)
    return b"".join(
        (
            b"subtree/v1\n\0",
            _short(name),
            time_s.to_bytes(_TIME_BYTES, "big"),
            _short(checkpoint.origin),
            (0).to_bytes(8, "big"),
            checkpoint.size.to_bytes(8, "big"),
            checkpoint.root,
        )
    )


def _short(text: str) -> bytes:
    content = text.encode()
    return bytes([len(content)]) + content


def _time_of(algorithm: int, signature: bytes) -> int:
    return 0 if algorithm == ED25519 else int.from_bytes(signature[:_TIME_BYTES], "big")


@dataclass(frozen=True, slots=True)
class Signature:
    """A line below a note. `content` has the time before the signature if the algorithm signs one."""

    name: str
    key_id: bytes
    content: bytes

    @property
    def line(self) -> str:
        return f"— {self.name} {base64.b64encode(self.key_id + self.content).decode()}\n"

    @classmethod
    def parse(cls, line: str) -> Signature:
        """Raises NoteError."""
        dash, _, rest = line.partition(" ")
        name, _, encoded = rest.partition(" ")
        content = _decoded(encoded)
        if dash != "—" or not _is_name(name) or content is None or len(content) <= _ID_BYTES:
            raise NoteError(f"found {line[:60]!r}, expected a signature line")
        return cls(name, content[:_ID_BYTES], content[_ID_BYTES:])


@dataclass(frozen=True, slots=True)
class SignedNote:
    """A text and its signatures. The text ends with a newline."""

    text: str
    signatures: tuple[Signature, ...] = ()

    def __str__(self) -> str:
        return self.text + "\n" + "".join(one.line for one in self.signatures)

    @classmethod
    def parse(cls, note: str) -> SignedNote:
        """Raises NoteError. A note without signatures is one, too: an unsigned checkpoint."""
        if len(note.encode("utf-8", "surrogatepass")) > MAX_NOTE_BYTES:
            raise NoteError(f"found a note of more than {MAX_NOTE_BYTES} bytes")
        text, blank, lines = note.rpartition("\n\n")
        if not blank or not text:
            raise NoteError("found no signed note, expected a text, an empty line and signature lines")
        signatures = lines.splitlines()
        if len(signatures) > MAX_SIGNATURES:
            raise NoteError(f"found {len(signatures)} signatures, expected at most {MAX_SIGNATURES}")
        return cls(text + "\n", tuple(Signature.parse(line) for line in signatures))

    def signers(self, keys: Iterable[VerifierKey]) -> tuple[list[VerifierKey], list[VerifierKey]]:
        """Those of the keys whose signature is on the note and valid, and those whose signature is not valid."""
        valid: list[VerifierKey] = []
        invalid: list[VerifierKey] = []
        for key in keys:
            mine = [one for one in self.signatures if one.name == key.name and one.key_id == key.id]
            if mine:
                (valid if all(key.verifies(self.text, one.content) for one in mine) else invalid).append(key)
        return valid, invalid


def _is_name(text: str) -> bool:
    return (
        bool(text) and len(text.encode()) <= MAX_NAME_BYTES and "+" not in text and not any(c.isspace() for c in text)
    )


def _decoded(text: str) -> bytes | None:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None


__all__ = [
    "ALGORITHMS",
    "COSIGNATURE",
    "ED25519",
    "MAX_NAME_BYTES",
    "MAX_NOTE_BYTES",
    "ML_DSA_44",
    "Checkpoint",
    "NoteError",
    "Signature",
    "SignedNote",
    "VerifierKey",
    "key_id",
    "keys_of",
    "signed_message",
]
