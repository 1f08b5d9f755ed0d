"""The Merkle tree against the published vectors, and against RFC 9162's recursive definitions written out literally."""

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import Code, FedmeshError
from services.transparency import merkle
from services.transparency.merkle import Frontier

# The reference leaves and roots of the certificate-transparency project (merkletree tests, testonly/constants.go).
LEAVES = [
    bytes.fromhex(text)
    for text in (
        "",
        "00",
        "10",
        "2021",
        "3031",
        "40414243",
        "5051525354555657",
        "606162636465666768696a6b6c6d6e6f",
    )
]
ROOTS = [
    "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]
INCLUSION = {
    (0, 8): [
        "96a296d224f285c67bee93c30f8a309157f0daa35dc5b87e410b78630a09cfc7",
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "6b47aaf29ee3c2af9af889bc1fb9254dabd31177f16232dd6aab035ca39bf6e4",
    ],
    (5, 8): [
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
}
CONSISTENCY: dict[tuple[int, int], list[str]] = {
    (1, 1): [],
    (1, 8): INCLUSION[0, 8],
    (6, 8): [
        "0ebc5d3437fbe2db158b9f126a1d118e308181031d0a949f8dededebc558ef6a",
        "ca854ea128ed050b41b35ffc1b87b8eb2bde461e9e3b5596ece6b9d5975a0ae0",
        "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    ],
    (2, 5): [
        "5f083f0a1a33ca076a95279832580db3e0ef4584bdff1f54c8a360f50de3031e",
        "bc1a0643b12e4d2d7c77918f44e0f4f79a838b6cf9ec5b5c283e1f4d88599e6b",
    ],
}


class Tree:
    """A stored tree: nodes by place, written once, and counted when read."""

    def __init__(self, hashes: Sequence[bytes]) -> None:
        self.frontier = Frontier()
        self.nodes: dict[tuple[int, int], bytes] = {}
        self.read: list[tuple[int, int]] = []
        for value in hashes:
            for level, position, made in self.frontier.append(value):
                assert (level, position) not in self.nodes
                self.nodes[level, position] = made

    def node(self, level: int, position: int) -> bytes:
        self.read.append((level, position))
        return self.nodes[level, position]


def naive_root(hashes: Sequence[bytes]) -> bytes:
    """MTH, RFC 9162, 2.1.1."""
    if not hashes:
        return hashlib.sha256().digest()
    if len(hashes) == 1:
        return hashes[0]
    k = naive_split(len(hashes))
    return hashlib.sha256(b"\x01" + naive_root(hashes[:k]) + naive_root(hashes[k:])).digest()


def naive_split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def naive_path(m: int, hashes: Sequence[bytes]) -> list[bytes]:
    """PATH, RFC 9162, 2.1.3.1."""
    if len(hashes) == 1:
        return []
    k = naive_split(len(hashes))
    if m < k:
        return [*naive_path(m, hashes[:k]), naive_root(hashes[k:])]
    return [*naive_path(m - k, hashes[k:]), naive_root(hashes[:k])]


def naive_subproof(m: int, hashes: Sequence[bytes], whole: bool) -> list[bytes]:
    """SUBPROOF, RFC 9162, 2.1.4.1."""
    if m == len(hashes):
        return [] if whole else [naive_root(hashes)]
    k = naive_split(len(hashes))
    if m <= k:
        return [*naive_subproof(m, hashes[:k], whole), naive_root(hashes[k:])]
    return [*naive_subproof(m - k, hashes[k:], False), naive_root(hashes[:k])]


def leaf_hashes(count: int) -> list[bytes]:
    return [merkle.leaf_hash(b"%d" % number) for number in range(count)]


def refused() -> "pytest.RaisesExc[FedmeshError]":
    return pytest.raises(FedmeshError, check=lambda error: error.code is Code.PROOF_INVALID)


@pytest.mark.parametrize("size", range(9))
def test_published_roots(size: int) -> None:
    hashes = [merkle.leaf_hash(leaf) for leaf in LEAVES[:size]]
    assert merkle.tree_root(hashes).hex() == ROOTS[size]
    assert merkle.stored_root(size, Tree([merkle.leaf_hash(leaf) for leaf in LEAVES]).node).hex() == ROOTS[size]


@pytest.mark.parametrize(("place", "expected"), INCLUSION.items())
def test_published_inclusion_proofs(place: tuple[int, int], expected: list[str]) -> None:
    index, size = place
    tree = Tree([merkle.leaf_hash(leaf) for leaf in LEAVES])
    proof = merkle.inclusion_proof(index, size, tree.node)
    assert [value.hex() for value in proof] == expected
    merkle.verify_inclusion(merkle.leaf_hash(LEAVES[index]), index, size, proof, bytes.fromhex(ROOTS[size]))


@pytest.mark.parametrize(("sizes", "expected"), CONSISTENCY.items())
def test_published_consistency_proofs(sizes: tuple[int, int], expected: list[str]) -> None:
    first, second = sizes
    tree = Tree([merkle.leaf_hash(leaf) for leaf in LEAVES])
    proof = merkle.consistency_proof(first, second, tree.node)
    assert [value.hex() for value in proof] == expected
    merkle.verify_consistency(first, second, bytes.fromhex(ROOTS[first]), bytes.fromhex(ROOTS[second]), proof)


def test_every_proof_of_every_small_tree_is_the_recursive_one() -> None:
    hashes = leaf_hashes(40)
    tree = Tree(hashes)
    for size in range(1, 41):
        root = naive_root(hashes[:size])
        assert merkle.stored_root(size, tree.node) == root
        shared: dict[tuple[int, int], bytes] = {}
        for index in range(size):
            proof = merkle.inclusion_proof(index, size, tree.node)
            assert proof == naive_path(index, hashes[:size])
            assert merkle.inclusion_proof(index, size, tree.node, shared) == proof
            merkle.verify_inclusion(hashes[index], index, size, proof, root)
        for first in range(1, size + 1):
            proof = merkle.consistency_proof(first, size, tree.node)
            assert proof == naive_subproof(first, hashes[:size], True)
            merkle.verify_consistency(first, size, naive_root(hashes[:first]), root, proof)


sizes = st.integers(min_value=1, max_value=300)
HASHES = leaf_hashes(300)
TREE = Tree(HASHES)


@given(size=sizes, data=st.data())
def test_a_changed_inclusion_proof_is_refused(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    proof = merkle.inclusion_proof(index, size, TREE.node)
    root = naive_root(HASHES[:size])
    merkle.verify_inclusion(HASHES[index], index, size, proof, root)
    other = data.draw(st.integers(0, size - 1).filter(lambda value: value != index) if size > 1 else st.just(size))
    with refused():
        merkle.verify_inclusion(HASHES[index], other, size, proof, root)
    with refused():
        merkle.verify_inclusion(merkle.leaf_hash(b"other"), index, size, proof, root)
    with refused():
        merkle.verify_inclusion(HASHES[index], index, size, [*proof, root], root)
    if proof:
        spot = data.draw(st.integers(0, len(proof) - 1))
        with refused():
            merkle.verify_inclusion(HASHES[index], index, size, proof[:spot] + proof[spot + 1 :], root)
        forged = [*proof[:spot], merkle.leaf_hash(b"forged"), *proof[spot + 1 :]]
        with refused():
            merkle.verify_inclusion(HASHES[index], index, size, forged, root)


@given(second=sizes, data=st.data())
def test_a_changed_consistency_proof_is_refused(second: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(1, second))
    proof = merkle.consistency_proof(first, second, TREE.node)
    old, new = naive_root(HASHES[:first]), naive_root(HASHES[:second])
    merkle.verify_consistency(first, second, old, new, proof)
    forged = merkle.leaf_hash(b"forged")
    with refused():
        merkle.verify_consistency(first, second, forged, new, proof)
    with refused():
        merkle.verify_consistency(first, second, old, forged, proof)
    with refused():
        merkle.verify_consistency(first, second, old, new, [*proof, forged])
    for spot in range(len(proof)):
        with refused():
            merkle.verify_consistency(first, second, old, new, [*proof[:spot], forged, *proof[spot + 1 :]])


@given(size=sizes, data=st.data())
def test_reads_are_logarithmic_and_announced(size: int, data: st.DataObject) -> None:
    index, first = data.draw(st.integers(0, size - 1)), data.draw(st.integers(1, size))
    TREE.read.clear()
    merkle.inclusion_proof(index, size, TREE.node)
    assert TREE.read == merkle.inclusion_nodes(index, size)
    assert len(TREE.read) <= 2 * size.bit_length()
    TREE.read.clear()
    merkle.consistency_proof(first, size, TREE.node)
    assert TREE.read == merkle.consistency_nodes(first, size)
    assert len(TREE.read) <= 2 * size.bit_length()


@given(cut=st.integers(0, 300))
def test_a_frontier_read_back_grows_like_one_that_was_kept(cut: int) -> None:
    places = merkle.frontier_nodes(cut)
    frontier = Frontier(cut, [TREE.nodes[place] for place in places])
    assert frontier.root() == naive_root(HASHES[:cut])
    assert [(node.level, node.position) for node in frontier.nodes()] == places
    for value in HASHES[cut:]:
        frontier.append(value)
    assert frontier.root() == naive_root(HASHES)


@pytest.mark.parametrize(
    ("index", "size"), [(0, 0), (1, 1), (-1, 4), (5, 4), (0, -1), (0, 2**63), (2**70, 2**71)], ids=str
)
def test_impossible_places_are_refused(index: int, size: int) -> None:
    with refused():
        merkle.inclusion_proof(index, size, TREE.node)
    with refused():
        merkle.verify_inclusion(HASHES[0], index, size, [], HASHES[0])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 4), (5, 4), (-1, 4), (1, 2**63)], ids=str)
def test_impossible_sizes_are_refused(first: int, second: int) -> None:
    with refused():
        merkle.consistency_proof(first, second, TREE.node)
    with refused():
        merkle.verify_consistency(first, second, HASHES[0], HASHES[0], [])


def test_hashes_of_another_length_are_refused() -> None:
    with refused():
        merkle.verify_inclusion(HASHES[0][:31], 0, 1, [], HASHES[0][:31])
    with refused():
        merkle.verify_inclusion(HASHES[0], 0, 2, [HASHES[1] + b"\x00"], naive_root(HASHES[:2]))
    with refused():
        merkle.verify_consistency(1, 1, b"", b"", [])
    with refused():
        Frontier().append(b"short")
    with refused():
        Frontier(3, [HASHES[0]])


def test_the_largest_tree_is_handled_in_few_steps() -> None:
    size = 2**63 - 1
    assert len(merkle.inclusion_nodes(2**62, size)) <= 126
    with refused():
        Frontier(size, [HASHES[0]] * 63).append(HASHES[1])
