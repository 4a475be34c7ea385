"""The keys that sign the journal's checkpoints: a file of this machine, never in the store.

The file is JSON: `{"strongroom_signing_keys": 1, "keys": [{"made_at": …, "ed25519": …, "ml_dsa_44": …}, …]}`, the
current key first. Its two values are the seeds of an Ed25519 and of an ML-DSA-44 key, 32 bytes each in base64. Former
keys have `"public": true` and their public keys instead: old checkpoints still verify, and nobody can sign with them.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import os
import secrets
import stat
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from .signed_note import ED25519, ML_DSA_44, Checkpoint, Signature, SignedNote, VerifierKey, signed_message

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA44PrivateKey

FORMAT = "strongroom_signing_keys"
MAX_KEYS = 100
MAX_FILE_BYTES = 1_000_000
_SEED_BYTES = 32
_TIME_BYTES = 8
_PUBLIC_BYTES = {"ed25519": 32, "ml_dsa_44": 1312}
_ALGORITHMS = {"ed25519": ED25519, "ml_dsa_44": ML_DSA_44}
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FormerKey:
    """A key that signs no more: its public keys."""

    made_at: str
    publics: tuple[bytes, bytes]
    """Ed25519 and ML-DSA-44."""

    def verifiers(self, name: str) -> list[VerifierKey]:
        """The public keys under a log's name."""
        return [VerifierKey(name, *pair) for pair in zip((ED25519, ML_DSA_44), self.publics, strict=True)]

    def document(self) -> dict[str, Any]:
        encoded = dict(zip(_ALGORITHMS, map(_encoded, self.publics), strict=True))
        return {"made_at": self.made_at, "public": True, **encoded}


class SigningKey:
    """A key pair of each algorithm."""

    def __init__(self, made_at: str, seeds: tuple[bytes, bytes]) -> None:
        from cryptography.hazmat.primitives.asymmetric import ed25519, mldsa

        self.made_at = made_at
        self._seeds = seeds
        self._ed25519: Ed25519PrivateKey = ed25519.Ed25519PrivateKey.from_private_bytes(seeds[0])
        self._ml_dsa: MLDSA44PrivateKey = mldsa.MLDSA44PrivateKey.from_seed_bytes(seeds[1])
        publics = self._ed25519.public_key().public_bytes_raw(), self._ml_dsa.public_key().public_bytes_raw()
        self.former = FormerKey(made_at, publics)
        """What stays of this key once another one signs."""

    @classmethod
    def new(cls) -> SigningKey:
        made_at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        return cls(made_at, (os.urandom(_SEED_BYTES), os.urandom(_SEED_BYTES)))

    def document(self) -> dict[str, Any]:
        return {"made_at": self.made_at, **dict(zip(_ALGORITHMS, map(_encoded, self._seeds), strict=True))}

    def sign_text(self, name: str, text: str) -> SignedNote:
        """Any text, which ends with a newline, as a note with an Ed25519 signature."""
        key, _ = self.former.verifiers(name)
        signature = self._ed25519.sign(signed_message(ED25519, name, text, 0))
        return SignedNote(text, (Signature(name, key.id, signature),))

    def sign_checkpoint(self, name: str, checkpoint: Checkpoint, time_s: int) -> SignedNote:
        """A checkpoint as a note with both signatures. `time_s`: that of the ML-DSA-44 cosignature, since the epoch."""
        note = self.sign_text(name, checkpoint.text)
        _, key = self.former.verifiers(name)
        signature = self._ml_dsa.sign(signed_message(ML_DSA_44, name, checkpoint.text, time_s))
        content = time_s.to_bytes(_TIME_BYTES, "big") + signature
        return SignedNote(note.text, (*note.signatures, Signature(name, key.id, content)))


class SigningKeys:
    """The keys of one file, which is read when they are needed, and again when it was changed: so every process signs
    with a new key soon after the rotation. `make`: a file that does not exist is made."""

    def __init__(self, path: str | Path, *, make: bool = False) -> None:
        self.path = Path(path)
        self._make = make
        self._read_from: tuple[int, int, int] | None = None
        self._keys: list[SigningKey | FormerKey] = []
        self.problem: str | None = None
        """Why the file could not be read the last time; the keys of the time before, if any, are in use."""

    @classmethod
    def of_store(cls, store_file: str) -> SigningKeys:
        """The keys beside an embedded store's file."""
        return cls(f"{store_file}.journal-key", make=True)

    @property
    def current(self) -> SigningKey:
        """The key that signs now. Raises ConfigError if the file was never read and cannot be read now."""
        try:
            if not self._keys or _identity(self.path) != self._read_from:
                self.read()
        except (OSError, ConfigError) as error:
            if self.problem is None:
                _log.warning("the signing keys cannot be read: %s", error)
            self.problem = str(error)
            if not self._keys:
                raise ConfigError(str(error)) from None
        return _private(self._keys, self.path)

    def sign(self, checkpoint: Checkpoint, time_s: int, name: str | None = None) -> str:
        """The signed note of a checkpoint. `name`: the log's origin (None: it is the checkpoint's own)."""
        return str(self.current.sign_checkpoint(name or checkpoint.origin, checkpoint, time_s))

    def read(self) -> None:
        """Read the file. Raises ConfigError if it is missing, damaged, or has no key to sign with."""
        if self._make and not self.path.exists():
            _write(self.path, [SigningKey.new()], replace=False)
        try:
            identity = _identity(self.path)
            with self.path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ConfigError(f"the signing keys {self.path} cannot be read: {error.strerror}") from None
        if stat.S_IMODE(self.path.stat().st_mode) & 0o077:
            _log.warning("%s: others than its owner may read the signing keys; expected the mode 0600", self.path)
        keys = _parsed(self.path, content)
        _private(keys, self.path)
        self._keys, self._read_from, self.problem = keys, identity, None

    def verifiers(self, name: str) -> list[VerifierKey]:
        """The public keys, the current ones first, under a log's name (its origin)."""
        current = self.current
        return current.former.verifiers(name) + [
            verifier
            for key in self._keys[1:]
            for verifier in (key.former if isinstance(key, SigningKey) else key).verifiers(name)
        ]

    def rotate(self) -> SigningKey:
        """Make a new key, which signs from now on; of the former one the public keys stay. Raises ConfigError."""
        self.read()
        kept: list[SigningKey | FormerKey] = [key.former if isinstance(key, SigningKey) else key for key in self._keys]
        new = SigningKey.new()
        _write(self.path, [new, *kept][:MAX_KEYS], replace=True)
        self.read()
        return new


def _private(keys: list[SigningKey | FormerKey], path: Path) -> SigningKey:
    if not keys or not isinstance(keys[0], SigningKey):
        raise ConfigError(f"the signing keys {path}: the first one cannot sign, it has public keys only")
    return keys[0]


def _identity(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_mtime_ns, status.st_size


def _parsed(path: Path, content: bytes) -> list[SigningKey | FormerKey]:
    try:
        if len(content) > MAX_FILE_BYTES:
            raise ValueError(f"found more than {MAX_FILE_BYTES} bytes")
        try:
            data = json.loads(content)
        except (ValueError, RecursionError):
            raise ValueError("found no JSON, expected a file that `strongroom audit keys --make` made") from None
        if not isinstance(data, dict) or data.get(FORMAT) != 1:
            raise ValueError(f"found no {FORMAT} of version 1")
        if not isinstance(data.get("keys"), list) or not 1 <= len(data["keys"]) <= MAX_KEYS:
            raise ValueError(f"expected 1 to {MAX_KEYS} keys")
        return [_key(number, one) for number, one in enumerate(data["keys"])]
    except ValueError as error:
        raise ConfigError(f"the signing keys {path}: {error}") from None


def _key(number: int, document: Any) -> SigningKey | FormerKey:
    """One key of the file. Raises ValueError, without the content, which is secret."""
    if not isinstance(document, dict):
        raise ValueError(f"key {number}: expected an object")
    is_public = document.get("public") is True
    values = []
    for name, size in _PUBLIC_BYTES.items():
        wanted = size if is_public else _SEED_BYTES
        try:
            value = base64.b64decode(document.get(name, ""), validate=True)
        except (binascii.Error, ValueError, TypeError):
            value = b""
        if len(value) != wanted:
            raise ValueError(f"key {number}: {name}: expected {wanted} bytes in base64")
        values.append(value)
    made_at = str(document.get("made_at", ""))
    pair = (values[0], values[1])
    return FormerKey(made_at, pair) if is_public else SigningKey(made_at, pair)


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _write(path: Path, keys: list[SigningKey | FormerKey], *, replace: bool) -> None:
    """Write the file beside itself and move it into place, durably, so that nobody reads a part of it. Without
    `replace` a file that another process made meanwhile stays. Raises ConfigError."""
    text = json.dumps({FORMAT: 1, "keys": [key.document() for key in keys]}, indent=1) + "\n"
    new = path.with_name(f"{path.name}.{secrets.token_hex(8)}.new")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with open(descriptor, "wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            if replace:
                os.replace(new, path)
            else:
                _link(new, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        finally:
            new.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(f"the signing keys {path} cannot be written: {error.strerror}") from None


def _link(new: Path, path: Path) -> None:
    try:
        os.link(new, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            os.replace(new, path)


__all__ = ["FormerKey", "SigningKey", "SigningKeys"]
