"""Merkle trees as RFC 6962 defines them: its published vectors, and the laws of proofs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from strongroom.journal.merkle import (
    EMPTY_ROOT,
    Frontier,
    consistency_ranges,
    inclusion_ranges,
    leaf_hash,
    prove,
    root_from_inclusion,
    root_of,
    verify_consistency,
)

# The inputs and roots of the reference tree of certificate transparency (RFC 6962 implementations publish them).
INPUTS = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
LEAVES = [leaf_hash(bytes.fromhex(text)) for text in INPUTS]
MANY = [leaf_hash(number.to_bytes(4)) for number in range(700)]


def subtree(level: int, number: int) -> bytes:
    return root_of(MANY[number << level : (number + 1) << level])


def test_the_published_roots() -> None:
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert [root_of(LEAVES[:size]).hex() for size in range(1, 9)] == ROOTS


@given(st.integers(1, 700), st.data())
def test_an_inclusion_proof_leads_to_the_root_and_no_other_leaf_does(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof = prove(inclusion_ranges(index, size), subtree)
    root = root_of(MANY[:size])
    assert root_from_inclusion(index, size, MANY[index], proof) == root
    assert root_from_inclusion(index, size, LEAVES[0], proof) != root
    for place in range(len(proof)):
        altered = [*proof]
        altered[place] = LEAVES[1]
        assert root_from_inclusion(index, size, MANY[index], altered) != root


@given(st.integers(1, 700), st.data())
def test_a_consistency_proof_holds_for_the_older_tree_alone(second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, second))
    proof = prove(consistency_ranges(first, second), subtree) if first < second else []
    older, newer = root_of(MANY[:first]), root_of(MANY[:second])
    assert verify_consistency(first, second, older, newer, proof)
    forked = root_of([*MANY[: first - 1], LEAVES[0]])
    assert not verify_consistency(first, second, forked, newer, proof)
    if proof:
        assert not verify_consistency(first, second, older, newer, proof[:-1])
        assert not verify_consistency(first, second, older, newer, [LEAVES[0], *proof[1:]])


@given(st.integers(0, 700), st.integers(0, 700))
def test_a_frontier_that_was_stored_goes_on_as_if_it_had_not_been(stored: int, size: int) -> None:
    stored = min(stored, size)
    frontier = Frontier()
    for leaf in MANY[:stored]:
        frontier.add(leaf)
    again = Frontier.of_bytes(stored, frontier.to_bytes())
    for leaf in MANY[stored:size]:
        again.add(leaf)
    assert again.root() == root_of(MANY[:size])
