"""An archive of a subtree proves its entries by itself, under every later checkpoint, and nothing in it can change."""

import random
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.transparency import archive
from services.transparency.archive import ArchiveWriter, Part, is_archive, read_archives, read_leaves, verify_archive
from services.transparency.canonical import canonical_json
from services.transparency.checkpoint import Checkpoint, SigningKey, generate_key, load_signing_key, sign_checkpoint
from services.transparency.merkle import Coordinate, Frontier, inclusion_proof, leaf_hash, tree_root

LEVEL = 2
LEAVES = [canonical_json({"event_id": f"e{number}", "number": number}) for number in range(23)]


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> SigningKey:
    path = tmp_path_factory.mktemp("key") / "log.key"
    generate_key(path, "consortium.test/audit")
    return load_signing_key(path)


def proof_of(part: Part, size: int) -> list[bytes]:
    frontier = Frontier()
    nodes: dict[Coordinate, bytes] = {}
    for leaf in LEAVES[:size]:
        nodes |= {Coordinate(node.level, node.position): node.hash for node in frontier.append(leaf_hash(leaf))}
    return inclusion_proof(part.first, size, lambda level, position: nodes[Coordinate(level, position)])[part.level :]


def note_of(size: int, key: SigningKey) -> str:
    return sign_checkpoint(Checkpoint(key.name, size, tree_root(map(leaf_hash, LEAVES[:size]))), key)


def write(folder: Path, part: Part, size: int, key: SigningKey) -> Path:
    fill(folder / part.folder, part, range(part.first, part.stop), size, proof_of(part, size), key)
    return folder / part.folder


def fill(folder: Path, part: Part, indices: range, size: int, proof: list[bytes], key: SigningKey) -> None:
    with ArchiveWriter(folder, part) as writer:
        for index in indices:
            writer.add(index, LEAVES[index])
        writer.finish(note_of(size, key), proof, key.verifier)


@pytest.mark.parametrize("part", [Part(0, 2), Part(4, 2), Part(8, 3), Part(16, 2), Part(0, 4)])
def test_a_subtree_is_proven_under_every_checkpoint_that_covers_it(tmp_path: Path, key: SigningKey, part: Part) -> None:
    for size in range(part.stop, len(LEAVES) + 1):
        report = verify_archive(write(tmp_path / str(size), part, size, key), key.verifier)
        assert (report.part, report.checkpoint.size) == (part, size)
        assert report.root == tree_root(map(leaf_hash, LEAVES[part.first : part.stop]))
        assert "the key that you trust" in report.statement
    assert [leaf for _, leaf in read_leaves(tmp_path / str(size) / part.folder, part)] == LEAVES[part.first : part.stop]


def test_every_flipped_byte_is_noticed(tmp_path: Path, key: SigningKey) -> None:
    folder = write(tmp_path, Part(4, LEVEL), 11, key)
    assert is_archive(folder)
    generator = random.Random(7)
    for name in archive.FILES:
        whole = (folder / name).read_bytes()
        for position in range(len(whole)):
            damaged = bytearray(whole)
            damaged[position] ^= 1 << generator.randrange(8)
            (folder / name).write_bytes(damaged)
            with pytest.raises(FedmeshError) as caught:
                verify_archive(folder)
            assert caught.value.code is Code.PROOF_INVALID, (name, position)
        (folder / name).write_bytes(whole)
    verify_archive(folder)


def test_an_archive_of_another_place_or_length_is_refused(tmp_path: Path, key: SigningKey) -> None:
    part = Part(4, LEVEL)
    wrong: dict[str, tuple[range, int, list[bytes]]] = {
        "moved": (range(8, 12), 12, proof_of(part, 12)),
        "of another subtree": (range(4, 8), 12, proof_of(Part(8, LEVEL), 12)),
        "short": (range(4, 7), 12, proof_of(part, 12)),
        "beyond the checkpoint": (range(4, 8), 7, []),
    }
    for name, (indices, size, proof) in wrong.items():
        with pytest.raises(FedmeshError) as caught:
            fill(tmp_path / name, part, indices, size, proof, key)
        assert caught.value.code is Code.PROOF_INVALID, name
        with pytest.raises(FedmeshError):
            verify_archive(tmp_path / name)


def test_archives_are_read_in_order_without_a_gap(tmp_path: Path, key: SigningKey) -> None:
    for part in (Part(0, 3), Part(8, LEVEL), Part(16, LEVEL)):
        write(tmp_path, part, 23, key)
    assert list(read_archives(tmp_path, key.verifier)) == list(enumerate(LEAVES[:12]))
    with pytest.raises(FedmeshError):
        list(read_archives(tmp_path / "nothing", key.verifier))
