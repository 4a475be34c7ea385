"""Verifies a file of `strongroom audit export FILE --proofs`. It needs Python and `cryptography`, no Strongroom.

    python verify_audit_export.py acme.jsonl keys.txt

`keys.txt` has what `strongroom audit keys` printed, kept from before; the Ed25519 keys are used. Exit status 0: whole,
1: tampered, 2: wrong call. docs/audit.md describes the format. An auditor can read all of this program.
"""

from __future__ import annotations

import base64
import functools
import json
import sys
from collections.abc import Iterable
from hashlib import sha256
from typing import Any
from urllib.parse import quote

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

ED25519 = 1
Keys = dict[tuple[str, bytes], Ed25519PublicKey]
decode = functools.partial(base64.b64decode, validate=True)


class Tampered(Exception):
    """What is wrong, as a sentence."""


def hash_of(content: bytes, kind: bytes = b"\x00") -> bytes:
    """The hash of a leaf, or with another kind of a node."""
    return sha256(kind + content).digest()


def node(left: bytes, right: bytes) -> bytes:
    return hash_of(left + right, b"\x01")


def netstring(text: str | None) -> bytes:
    content = (text or "").encode()
    return b"%d:%s," % (len(content), content)


def commitment(line: dict[str, Any], number: int, value: bytes | None) -> bytes:
    """SHA-256 over a salt and the value; of a redacted value only the commitment is left."""
    salt = line["salts"][number]
    if salt is None:
        if (value if number < 3 else list(json.loads(value or b"{}"))) != (b"0:,0:,", b"", None, ["redacted"])[number]:
            raise ValueError("something stands in the place of a redacted value")
        return decode(line["commitments"][number])
    if len(decode(salt)) != 16:
        raise ValueError("a salt has not 16 bytes")
    return bytes(32) if value is None else sha256(decode(salt) + value).digest()


def leaf_hash(line: dict[str, Any]) -> bytes:
    """The leaf of a record or of a sealing round."""
    if line["kind"] == "round":
        return round_leaf(line["number"], line["count"], decode(line["root"]))
    fields = [line["id"], line["tenant"], str(line["at_us"]), line["request_id"], line["action"], line["collection"]]
    before, after = (None if line[name] is None else line[name].encode() for name in ("before", "after"))
    values = [netstring(line["actor"]) + netstring(line["claims"]), line["entity_id"].encode(), before, after]
    content = b"strongroom/1\n" + b"".join(map(netstring, [*fields, line["rules"]]))
    content += b"".join(commitment(line, number, value) for number, value in enumerate(values))
    return hash_of(content)


def round_leaf(number: int, count: int, root: bytes) -> bytes:
    return hash_of(f"strongroom-round/1\n{number}\n{count}\n{root.hex()}\n".encode())


class Tree:
    """The hashes of the complete subtrees along the right edge, the largest first."""

    def __init__(self, size: int, hashes: Iterable[str]) -> None:
        self.size, self.hashes = size, [decode(text) for text in hashes]
        if len(self.hashes) != bin(size).count("1") or any(len(one) != 32 for one in self.hashes):
            raise Tampered("the hashes before the first record do not fit its index")

    def add(self, hash: bytes, leaves: int = 1) -> None:
        """Add a complete subtree with so many leaves."""
        edge = self.size // leaves
        self.size += leaves
        while edge & 1:
            hash = node(self.hashes.pop(), hash)
            edge >>= 1
        self.hashes.append(hash)

    def root(self) -> bytes:
        return functools.reduce(lambda right, left: node(left, right), self.hashes[::-1] or [sha256().digest()])


def add_rest(tree: Tree, size: int, hashes: list[str]) -> None:
    """Add the complete subtrees from the last record to the size of the checkpoint."""
    for text in hashes[: 64 if tree.size < size else 0]:
        leaves = 1 << max((size - tree.size).bit_length() - 1, 0)
        tree.add(decode(text), min(leaves, tree.size & -tree.size or leaves))
    if tree.size != size:
        raise Tampered("the hashes after the last record do not fit the checkpoint's size")


def root_by_path(index: int, size: int, hash: bytes, path: list[str]) -> bytes:
    """The root that an inclusion proof leads to (RFC 9162, section 2.1.3.2). A wrong path leads to another root."""
    at, last = index, size - 1
    for text in path:
        if at & 1 or at == last:
            hash = node(decode(text), hash)
            while not at & 1 and at:
                at, last = at >> 1, last >> 1
        else:
            hash = node(hash, decode(text))
        at, last = at >> 1, last >> 1
    return hash


def keys_of(text: str) -> Keys:
    """The Ed25519 keys of a file, one a line: `name+id+base64(type, key)`."""
    keys = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition("+")
        content = decode(rest.partition("+")[2]) if rest else b""
        if content[:1] == bytes([ED25519]):
            id = sha256(name.encode() + b"\n" + content).digest()[:4]
            keys[name, id] = Ed25519PublicKey.from_public_bytes(content[1:])
    return keys


def checked_note(note: str, origin: str, keys: Keys) -> tuple[int, bytes]:
    """The size and root of a checkpoint, once one of the keys signed it."""
    text, _, signatures = note.rpartition("\n\n")
    text += "\n"
    found, size, root, *_ = text.split("\n")
    if found != origin:
        raise Tampered(f"the checkpoint is of {found!r}, expected {origin!r}")
    for line in signatures.splitlines():
        _, name, encoded = line.split(" ")
        content = decode(encoded)
        if (key := keys.get((name, content[:4]))) is not None:
            key.verify(content[4:], text.encode())
            return int(size), decode(root)
    raise Tampered("none of the given keys signed the checkpoint")


def verify(lines: Iterable[bytes], keys: Keys) -> str:
    """What was verified, as a sentence. Raises Tampered; ValueError, KeyError or TypeError for what is no export."""
    rest = iter(lines)
    header: dict[str, Any] = json.loads(next(rest))
    log, tenant = header["log"], header["tenant"]
    origin = log if tenant is None else f"{log}/tenants/{quote(tenant, safe='')}"
    tree, closing = Tree(header["first"], header["before"]), None
    for content in rest:
        try:
            line: dict[str, Any] = json.loads(content)
            if line["kind"] == "closing":
                closing = line
                break
            good = line["index"] == tree.size and line.get("tenant") == (tenant if line["kind"] == "record" else None)
            hash = leaf_hash(line) if good else b""
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Tampered(f"index {tree.size}: the line is no record") from None
        if not good or hash != decode(line["leaf"]):
            raise Tampered(f"index {tree.size}: the record was altered, removed, moved or added")
        tree.add(hash)
    if closing is None or tree.size != header["end"]:
        raise Tampered(f"index {tree.size}: the file ends too early")
    add_rest(tree, header["size"], closing["after"])
    size, root = checked_note(closing["checkpoint"], origin, keys)
    if (size, root) != (tree.size, tree.root()):
        raise Tampered("the records do not lead to the root of the checkpoint")
    if tenant is not None and (proof := closing["round"]) is not None:
        entry = json.dumps(proof["entry"], separators=(",", ":")).encode()
        of_round = root_by_path(proof["entry_index"], proof["count"], hash_of(entry), proof["path"])
        leaf = round_leaf(proof["number"], proof["count"], of_round)
        platform_size, platform_root = checked_note(proof["checkpoint"], log, keys)
        sealed = root_by_path(proof["index"], platform_size, leaf, proof["proof"])
        tree_id = "t" + sha256(tenant.encode()).hexdigest()[:40]
        if sealed != platform_root or proof["entry"] != [tree_id, size, root.hex()]:
            raise Tampered("the platform's checkpoint does not cover the tenant's")
    return f"whole: the records {header['first']} to {header['end'] - 1} of {size}"


def main(arguments: list[str]) -> int:
    try:
        export, keys = arguments
        with open(keys, encoding="utf-8") as known, open(export, "rb") as lines:
            print(verify(lines, keys_of(known.read())))
            return 0
    except (Tampered, InvalidSignature) as error:
        print(f"TAMPERED: {error}" if str(error) else "TAMPERED: the signature of the checkpoint is not valid")
        return 1
    except (OSError, ValueError, KeyError, TypeError, StopIteration, RecursionError) as error:
        print(f"expected an export and a file of public keys: {type(error).__name__}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
