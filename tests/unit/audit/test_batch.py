"""A batch extends the tree densely, once for every event id, and one request's fault is its own."""

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from services.audit.domain.batch import Entry, extend
from services.audit.domain.event import Leaf
from services.common.errors import Code, FedmeshError
from services.transparency.merkle import Frontier, inclusion_proof, leaf_hash, tree_root, verify_inclusion


def leaf(number: int, content: bytes | None = None) -> Leaf:
    return Leaf(UUID(int=number), b"%d" % number if content is None else content)


def entry(index: int, number: int) -> Entry:
    return Entry(index, UUID(int=number), leaf_hash(b"%d" % number))


def test_new_and_known_events_get_their_places() -> None:
    frontier = Frontier()
    frontier.append(entry(0, 7).leaf_hash)
    made = extend(frontier, {UUID(int=7): entry(0, 7)}, [[leaf(8), leaf(7)], [leaf(9), leaf(8), leaf(9)]])
    assert made.entries == [entry(1, 8), entry(2, 9)]
    assert made.outcomes == [(entry(1, 8), entry(0, 7)), (entry(2, 9), entry(1, 8), entry(2, 9))]
    assert frontier.size == 3
    assert frontier.root() == tree_root(leaf_hash(b"%d" % number) for number in (7, 8, 9))


def test_a_conflict_refuses_its_request_whole_and_no_other() -> None:
    frontier = Frontier()
    requests = [[leaf(1)], [leaf(2), leaf(1, b"other")], [leaf(3), leaf(3, b"other")], [leaf(2, b"taken after all")]]
    made = extend(frontier, {}, requests)
    assert made.leaves == [b"1", b"taken after all"]
    assert [item.leaf_hash for item in made.entries] == [leaf_hash(content) for content in made.leaves]
    refused = [outcome for outcome in made.outcomes if isinstance(outcome, FedmeshError)]
    assert [error.code for error in refused] == [Code.REQUEST_ID_REUSED] * 2
    assert [error.detail["event_id"] for error in refused] == [str(UUID(int=1)), str(UUID(int=3))]
    assert made.outcomes[1] is refused[0]


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=6), max_size=8), st.integers(0, 20))
def test_proofs_of_new_entries_need_only_the_old_edge_and_the_new_hashes(numbers: list[list[int]], before: int) -> None:
    frontier = Frontier()
    old = [entry(index, 100 + index) for index in range(before)]
    for item in old:
        frontier.append(item.leaf_hash)
    edge = {(node.level, node.position): node.hash for node in frontier.nodes()}
    made = extend(frontier, {}, [[leaf(number) for number in request] for request in numbers])
    hashes = edge | made.hashes()
    assert [item.index for item in made.entries] == list(range(before, frontier.size))
    assert len({item.event_id for item in made.entries}) == len(made.entries)
    for item in made.entries:
        proof = inclusion_proof(item.index, frontier.size, lambda level, position: hashes[level, position])
        verify_inclusion(item.leaf_hash, item.index, frontier.size, proof, frontier.root())
    assert frontier.root() == tree_root(item.leaf_hash for item in [*old, *made.entries])
