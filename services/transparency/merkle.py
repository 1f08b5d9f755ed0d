"""The Merkle tree of RFC 9162, section 2.1, with SHA-256.

A tree is kept as the hashes of its complete subtrees. The subtree at `(level, position)` covers the leaves from
`position << level` up to, and without, `(position + 1) << level`; level 0 holds the leaf hashes. Such a hash never
changes once it exists, so a store needs insertion alone, and every root and proof of every past size is made from
O(log n) of them. A function that reads them takes `node(level, position) -> hash`; its companion `*_nodes` names
beforehand what it will read, for stores that are asked once for all.

All hashes are 32 bytes. Sizes are checked before anything is hashed.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

from services.common.errors import Code, FedmeshError

HASH_BYTES: Final = 32
# Sizes and indices fit a signed 64-bit integer, the widest of every store and wire format in use.
MAX_SIZE: Final = 2**63 - 1
# RFC 9162, 2.1.1: the hash of an empty list is the hash of an empty string.
EMPTY_ROOT: Final = hashlib.sha256(b"").digest()

NodeReader = Callable[[int, int], bytes]
"""Reads the hash of the complete subtree at (level, position)."""


class Coordinate(NamedTuple):
    """The place of a complete subtree: its level, and its position from the left within that level."""

    level: int
    position: int


class Node(NamedTuple):
    """The hash of a complete subtree and its place."""

    level: int
    position: int
    hash: bytes


def leaf_hash(leaf: bytes) -> bytes:
    """SHA-256(0x00 || leaf) (RFC 9162, 2.1.1)."""
    return hashlib.sha256(b"\x00" + leaf).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right) (RFC 9162, 2.1.1)."""
    return hashlib.sha256(b"\x01" + left + right).digest()


class Frontier:
    """The right edge of a growing tree: the hashes of its maximal complete subtrees, largest first.

    Appending costs O(1) amortised, O(log n) at worst, and needs no other part of the tree.
    """

    def __init__(self, size: int = 0, hashes: Sequence[bytes] = ()) -> None:
        """A tree of `size` leaves whose subtrees at `frontier_nodes(size)` have these hashes.

        Raises: FedmeshError(PROOF_INVALID) when the number of hashes does not fit the size.
        """
        _require_size(size)
        if len(hashes) != size.bit_count():
            raise _invalid(f"a tree of {size} leaves has {size.bit_count()} edge hashes, not {len(hashes)}")
        _require_hashes(hashes)
        self._size = size
        self._hashes = list(hashes)

    @property
    def size(self) -> int:
        """Number of leaves."""
        return self._size

    def nodes(self) -> list[Node]:
        """The maximal complete subtrees, largest first."""
        places = frontier_nodes(self._size)
        return [Node(*place, value) for place, value in zip(places, self._hashes, strict=True)]

    def append(self, value: bytes) -> list[Node]:
        """Add a leaf by its leaf hash. Returns the complete subtrees that this made, the leaf itself first.

        Raises: FedmeshError(PROOF_INVALID) when it is not a hash, or the tree is full.
        """
        _require_hashes([value])
        _require_size(self._size + 1)
        made = [Node(0, self._size, value)]
        rest = self._size
        while rest & 1:
            value = node_hash(self._hashes.pop(), value)
            rest >>= 1
            made.append(Node(len(made), rest, value))
        self._hashes.append(value)
        self._size += 1
        return made

    def root(self) -> bytes:
        """The root hash, MTH(D_n) (RFC 9162, 2.1.1)."""
        return _fold(self._hashes) if self._hashes else EMPTY_ROOT


def tree_root(leaf_hashes: Iterable[bytes]) -> bytes:
    """The root over leaf hashes, in one pass and O(log n) memory (RFC 9162, 2.1.2).

    Raises: FedmeshError(PROOF_INVALID) when one of them is not a hash.
    """
    frontier = Frontier()
    for value in leaf_hashes:
        frontier.append(value)
    return frontier.root()


def frontier_nodes(size: int) -> list[Coordinate]:
    """The maximal complete subtrees of a tree, largest first: one for every one-bit of its size.

    Raises: FedmeshError(PROOF_INVALID) when the size is negative or too large.
    """
    _require_size(size)
    return _cover(0, size)


def stored_root(size: int, node: NodeReader) -> bytes:
    """The root of the first `size` leaves, from the hashes at `frontier_nodes(size)`.

    Raises: FedmeshError(PROOF_INVALID) when the size is negative or too large.
    """
    return Frontier(size, [node(*place) for place in frontier_nodes(size)]).root()


def inclusion_nodes(index: int, size: int) -> list[Coordinate]:
    """What `inclusion_proof` reads.

    Raises: FedmeshError(PROOF_INVALID) unless 0 <= index < size.
    """
    return [place for span in _inclusion_spans(index, size) for place in _cover(*span)]


def inclusion_proof(
    index: int, size: int, node: NodeReader, shared: dict[tuple[int, int], bytes] | None = None
) -> list[bytes]:
    """PATH(index, D_size), leaf to root (RFC 9162, 2.1.3.1).

    shared: hashes by range of leaves, which proofs in one tree give to each other; it grows.

    Raises: FedmeshError(PROOF_INVALID) unless 0 <= index < size.
    """
    known = {} if shared is None else shared
    spans = _inclusion_spans(index, size)
    for span in spans:
        if span not in known:
            known[span] = _span_hash(span, node)
    return [known[span] for span in spans]


def consistency_nodes(first: int, second: int) -> list[Coordinate]:
    """What `consistency_proof` reads.

    Raises: FedmeshError(PROOF_INVALID) unless 0 < first <= second.
    """
    return [place for span in _consistency_spans(first, second) for place in _cover(*span)]


def consistency_proof(first: int, second: int, node: NodeReader) -> list[bytes]:
    """PROOF(first, D_second) (RFC 9162, 2.1.4.1); empty when the sizes are equal.

    Raises: FedmeshError(PROOF_INVALID) unless 0 < first <= second.
    """
    return [_span_hash(span, node) for span in _consistency_spans(first, second)]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that the leaf hash `leaf` stands at `index` in the tree of `size` leaves with this root (2.1.3.2).

    Raises: FedmeshError(PROOF_INVALID) when that is not proven.
    """
    expected = len(_inclusion_spans(index, size))
    if len(proof) != expected:
        raise _invalid(f"an inclusion proof for entry {index} of {size} has {expected} hashes, not {len(proof)}")
    _require_hashes([leaf, root, *proof])
    position, last, value = index, size - 1, leaf
    for sibling in proof:
        if position & 1 or position == last:
            value = node_hash(sibling, value)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            value = node_hash(value, sibling)
        position, last = position >> 1, last >> 1
    if last or value != root:
        raise _invalid(f"entry {index} is not in the tree of {size} entries with this root")


def verify_consistency(first: int, second: int, first_root: bytes, second_root: bytes, proof: Sequence[bytes]) -> None:
    """Check that the tree of `first` leaves is a prefix of the tree of `second` leaves (RFC 9162, 2.1.4.2).

    Raises: FedmeshError(PROOF_INVALID) when that is not proven.
    """
    expected = len(_consistency_spans(first, second))
    if len(proof) != expected:
        raise _invalid(f"a consistency proof from {first} to {second} has {expected} hashes, not {len(proof)}")
    _require_hashes([first_root, second_root, *proof])
    path = [first_root, *proof] if first & (first - 1) == 0 else list(proof)
    position, last = first - 1, second - 1
    while position & 1:
        position, last = position >> 1, last >> 1
    old = new = path[0] if path else first_root
    for sibling in path[1:]:
        if position & 1 or position == last:
            old, new = node_hash(sibling, old), node_hash(sibling, new)
            while not position & 1 and position:
                position, last = position >> 1, last >> 1
        else:
            new = node_hash(new, sibling)
        position, last = position >> 1, last >> 1
    # Equal trees need no proof, and the walk above no steps: only the two roots are compared.
    if first == second:
        old, new, last = first_root, first_root, 0
    if last or old != first_root or new != second_root:
        raise _invalid(f"the tree of {first} entries is not a prefix of the tree of {second} entries: the log forked")


def _inclusion_spans(index: int, size: int) -> list[tuple[int, int]]:
    """The leaf ranges whose hashes make up PATH(index, D_size), leaf to root."""
    _require_size(size)
    if not 0 <= index < size:
        raise _invalid(f"there is no entry {index} in a tree of {size} entries")
    spans, low, high = [], 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            spans.append((middle, high))
            high = middle
        else:
            spans.append((low, middle))
            low = middle
    spans.reverse()
    return spans


def _consistency_spans(first: int, second: int) -> list[tuple[int, int]]:
    """The leaf ranges whose hashes make up PROOF(first, D_second), in the order of the proof."""
    _require_size(second)
    if not 0 < first <= second:
        raise _invalid(f"consistency is proven from a size in 1..{second} to {second}, not from {first}")
    spans, low, high = [], 0, second
    while high != first:
        middle = low + _split(high - low)
        if first <= middle:
            spans.append((middle, high))
            high = middle
        else:
            spans.append((low, middle))
            low = middle
    # SUBPROOF(m, D_m, true) is empty: the verifier has that root already. Past a step to the right it has not.
    if low:
        spans.append((low, high))
    spans.reverse()
    return spans


def _split(count: int) -> int:
    """The largest power of two smaller than `count` (`count` > 1)."""
    return 1 << ((count - 1).bit_length() - 1)


def _cover(low: int, high: int) -> list[Coordinate]:
    """The maximal complete subtrees over leaves [low, high), left to right; `low` is a multiple of the largest."""
    places = []
    while low < high:
        level = (high - low).bit_length() - 1
        places.append(Coordinate(level, low >> level))
        low += 1 << level
    return places


def _span_hash(span: tuple[int, int], node: NodeReader) -> bytes:
    return _fold([node(*place) for place in _cover(*span)])


def _fold(hashes: Sequence[bytes]) -> bytes:
    """The hash over adjoining complete subtrees of falling size: the smallest are joined first."""
    value = hashes[-1]
    for left in reversed(hashes[:-1]):
        value = node_hash(left, value)
    return value


def _require_size(size: int) -> None:
    if not 0 <= size <= MAX_SIZE:
        raise _invalid(f"a tree cannot have {size} entries")


def _require_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(value) != HASH_BYTES for value in hashes):
        raise _invalid(f"every hash of a tree has {HASH_BYTES} bytes")


def _invalid(message: str) -> FedmeshError:
    return FedmeshError(Code.PROOF_INVALID, message)
