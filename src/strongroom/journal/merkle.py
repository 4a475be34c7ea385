"""RFC 6962 Merkle trees: hashing, roots, and which subtrees prove that a leaf, or a smaller tree, is in a tree. Pure.

A proof is a list of hashes of subtrees. A subtree is named by the range of leaves below it, `(begin, end)`. A range of
2**level leaves that begins at a multiple of 2**level is complete: its hash never changes, so it can be stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from hashlib import sha256

HASH_BYTES = 32
EMPTY_ROOT = sha256(b"").digest()
Range = tuple[int, int]


def leaf_hash(content: bytes) -> bytes:
    """The hash of a leaf with this content (RFC 6962, section 2.1)."""
    return sha256(b"\x00" + content).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return sha256(b"\x01" + left + right).digest()


class Frontier:
    """The complete subtrees along a tree's right edge, the largest first: enough to add leaves and to know the root.

    It holds at most one hash for each bit of the size: a tree of a billion leaves needs 30 hashes.
    """

    __slots__ = ("hashes", "size")

    def __init__(self, size: int = 0, hashes: Iterable[bytes] = ()) -> None:
        self.size = size
        self.hashes = list(hashes)
        if len(self.hashes) != size.bit_count():
            raise ValueError(f"found {len(self.hashes)} hashes, expected {size.bit_count()} for {size} leaves")

    def add(self, leaf: bytes) -> None:
        """Add the hash of the next leaf."""
        hashes, size = self.hashes, self.size
        self.size = size + 1
        while size & 1:
            leaf = sha256(b"\x01" + hashes.pop() + leaf).digest()
            size >>= 1
        hashes.append(leaf)

    def add_subtree(self, level: int, root: bytes) -> None:
        """Add the next 2**level leaves by the root of their subtree. The size must be a multiple of 2**level."""
        hashes, size = self.hashes, self.size >> level
        if size << level != self.size:
            raise ValueError(f"found {self.size} leaves, expected a multiple of {1 << level}")
        self.size += 1 << level
        while size & 1:
            root = node_hash(hashes.pop(), root)
            size >>= 1
        hashes.append(root)

    def root(self) -> bytes:
        return joined(self.hashes)

    def copy(self) -> Frontier:
        return Frontier(self.size, self.hashes)

    def to_bytes(self) -> bytes:
        return b"".join(self.hashes)

    @classmethod
    def of_bytes(cls, size: int, content: bytes) -> Frontier:
        """Raises ValueError if the content does not fit the size."""
        return cls(size, split(content))


def split(content: bytes) -> list[bytes]:
    """The hashes that are stored one after the other."""
    if len(content) % HASH_BYTES:
        raise ValueError(f"found {len(content)} bytes, expected a multiple of {HASH_BYTES}")
    return [content[at : at + HASH_BYTES] for at in range(0, len(content), HASH_BYTES)]


def joined(hashes: Sequence[bytes]) -> bytes:
    """The root above complete subtrees of one tree's right edge, the largest first."""
    if not hashes:
        return EMPTY_ROOT
    *rest, root = hashes
    for left in reversed(rest):
        root = node_hash(left, root)
    return root


def root_of(leaves: Iterable[bytes]) -> bytes:
    """The root of a tree with these leaf hashes."""
    frontier = Frontier()
    for leaf in leaves:
        frontier.add(leaf)
    return frontier.root()


# --- Which subtrees a proof has -------------------------------------------------------------------------------


def _half(count: int) -> int:
    """The greatest power of two that is less than `count`, which is 2 or more."""
    return 1 << ((count - 1).bit_length() - 1)


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """The subtrees that prove the leaf `index` in a tree of `size` leaves, the lowest first (RFC 9162, 2.1.3.1)."""
    if not 0 <= index < size:
        raise ValueError(f"found index {index}, expected one below {size}")
    ranges: list[Range] = []
    begin, end = 0, size
    while end - begin > 1:
        middle = begin + _half(end - begin)
        if index < middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((begin, middle))
            begin = middle
    return ranges[::-1]


def consistency_ranges(first: int, second: int) -> list[Range]:
    """The subtrees that prove that a tree of `first` leaves is the beginning of one of `second` (RFC 9162, 2.1.4.1)."""
    if not 0 < first <= second:
        raise ValueError(f"found sizes {first} and {second}, expected 0 < first <= second")
    ranges: list[Range] = []
    begin, end, whole = 0, second, True
    while first < end:
        middle = begin + _half(end - begin)
        if first <= middle:
            ranges.append((middle, end))
            end = middle
        else:
            ranges.append((begin, middle))
            begin, whole = middle, False
    if not whole:
        ranges.append((begin, end))
    return ranges[::-1]


def complete_subtrees(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """The complete subtrees `(level, number)` that make up a range of a proof, from left to right."""
    while begin < end:
        level = (end - begin).bit_length() - 1
        if begin:
            level = min(level, (begin & -begin).bit_length() - 1)
        yield level, begin >> level
        begin += 1 << level


# --- Verifying ------------------------------------------------------------------------------------------------


def root_from_inclusion(index: int, size: int, leaf: bytes, proof: Sequence[bytes]) -> bytes:
    """The root that an inclusion proof leads to. Raises ValueError for a proof of another length."""
    ranges = inclusion_ranges(index, size)
    if len(proof) != len(ranges):
        raise ValueError(f"found {len(proof)} hashes, expected {len(ranges)}")
    found = leaf
    for (begin, _), sibling in zip(ranges, proof, strict=True):
        found = node_hash(sibling, found) if begin <= index else node_hash(found, sibling)
    return found


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]) -> bool:
    """Whether the proof shows that the tree of `second` leaves began as the tree of `first` leaves."""
    if first == second:
        return not proof and first_root == second_root
    if first == 0:
        return not proof
    if not 0 < first < second:
        return False
    ranges = consistency_ranges(first, second)
    if len(proof) != len(ranges):
        return False
    return _consistent(0, second, first, True, dict(zip(ranges, proof, strict=True)), first_root) == (
        first_root,
        second_root,
    )


def _consistent(
    begin: int, end: int, first: int, whole: bool, proof: dict[Range, bytes], first_root: bytes
) -> tuple[bytes, bytes]:
    """The hashes of a subtree in the older tree and in the newer one."""
    if first == end:
        found = first_root if whole else proof[begin, end]
        return found, found
    middle = begin + _half(end - begin)
    if first <= middle:
        old, new = _consistent(begin, middle, first, whole, proof, first_root)
        return old, node_hash(new, proof[middle, end])
    left = proof[begin, middle]
    old, new = _consistent(middle, end, first, False, proof, first_root)
    return node_hash(left, old), node_hash(left, new)


def prove(ranges: Iterable[Range], subtree: Callable[[int, int], bytes]) -> list[bytes]:
    """The hashes of ranges, from a function that gives the hash of a complete subtree by (level, number)."""
    return [joined([subtree(*one) for one in complete_subtrees(*range)]) for range in ranges]


__all__ = [
    "EMPTY_ROOT",
    "HASH_BYTES",
    "Frontier",
    "complete_subtrees",
    "consistency_ranges",
    "inclusion_ranges",
    "joined",
    "leaf_hash",
    "node_hash",
    "prove",
    "root_from_inclusion",
    "root_of",
    "split",
    "verify_consistency",
]
