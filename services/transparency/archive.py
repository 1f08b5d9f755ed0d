"""An archive of a part of a log: five files in a folder, which `verify_archive` checks with nothing else at hand.

The part is a complete subtree of the Merkle tree: 2^level entries from a multiple of that on. As in an export there are
`entries.jsonl` (of these entries), `checkpoint` (over at least these entries), `log.vkey` and `manifest.json`; and

- `proof`: one line a hash, in hex: the way from the subtree's root to the checkpoint's root. Above their level, trees
  of entries and of subtrees have the same shape, so that it is the inclusion proof (RFC 9162, 2.1.3) of leaf
  `first >> level` in the tree of ceil(size / 2^level) leaves.

Nothing in it depends on when or where it was written.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.transparency import verify
from services.transparency.canonical import canonical_json, parse_canonical
from services.transparency.checkpoint import Checkpoint, VerifierKey, open_checkpoint
from services.transparency.export import (
    CHECKPOINT,
    CONTENT,
    ENTRIES,
    KEY,
    MANIFEST,
    EntriesWriter,
    file_digests,
    listed,
    unwritable,
)
from services.transparency.merkle import Frontier, verify_inclusion

FORMAT: Final = "fedmesh-audit-archive/1"
PROOF: Final = "proof"
FILES: Final = (*CONTENT, PROOF, MANIFEST)
_MAX_LEVEL: Final = 62


@dataclass(frozen=True)
class Part:
    """A complete subtree: 2^level entries from `first` on."""

    first: int
    level: int

    @property
    def stop(self) -> int:
        """The index after its last entry."""
        return self.first + (1 << self.level)

    @property
    def folder(self) -> str:
        """The name of its folder among other archives."""
        return f"entries-{self.first:012d}-{self.stop - 1:012d}"

    def verify(self, root: bytes, proof: Sequence[bytes], checkpoint: Checkpoint) -> None:
        """Check that the subtree with this root is in its place under the checkpoint.

        Raises: FedmeshError(PROOF_INVALID).
        """
        if checkpoint.size < self.stop:
            raise FedmeshError(
                Code.PROOF_INVALID, f"the checkpoint covers {checkpoint.size} entries, not all up to {self.stop - 1}"
            )
        blocks = (checkpoint.size - 1 >> self.level) + 1
        verify_inclusion(root, self.first >> self.level, blocks, proof, checkpoint.root)


@dataclass(frozen=True)
class ArchiveReport:
    """What an archive proves. root: of its subtree. manifest: as it is stored. trusted: the caller gave the key."""

    part: Part
    root: bytes
    checkpoint: Checkpoint
    note: str
    manifest: str
    key: str
    trusted: bool

    def require(self, part: Part) -> None:
        """Raises: FedmeshError(PROOF_INVALID) when the archive is of another part."""
        if self.part != part:
            raise FedmeshError(Code.PROOF_INVALID, f"{part.folder} holds entries from {self.part.first} on")

    @property
    def statement(self) -> str:
        """The result in words, with its limits."""
        proven = (
            f"Entries {self.part.first} to {self.part.stop - 1} of {self.checkpoint.origin} are in their places under "
            f"root {self.checkpoint.root.hex()} over {self.checkpoint.size} entries"
        )
        if self.trusted:
            return f"{proven}, signed by the key that you trust, {self.key}."
        return (
            f"{proven}, signed by the key inside the archive, {self.key}. This shows only that the archive agrees with "
            "itself: pass the key that your consortium published to the verifier."
        )


class ArchiveWriter(EntriesWriter):
    """Writes an archive entry by entry: `add` all of the part in order, then `finish` once.

    Without `finish` there is no manifest, and such a folder verifies as nothing.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        """Raises: FedmeshError(INVALID_ARGUMENT) when the folder is there or unusable, (STORE_FULL) without room."""
        self._part = part
        try:
            folder.mkdir(parents=True)
            super().__init__(folder, part.first)
        except OSError as error:
            raise unwritable(folder, error) from error

    def finish(self, note: str, proof: Sequence[bytes], verifier: VerifierKey) -> None:
        """Check the entries against the signed checkpoint, and have all files on the disk.

        proof: from the subtree's root to that of the checkpoint `note`.

        Raises: FedmeshError(PROOF_INVALID) when the entries are not those under the checkpoint; (STORE_FULL).
        """
        checkpoint = open_checkpoint(note, verifier)
        if self.frontier.size != 1 << self._part.level:
            raise FedmeshError(
                Code.PROOF_INVALID, f"{self.frontier.size} entries came, and not {1 << self._part.level}"
            )
        root = self.frontier.root()
        self._part.verify(root, proof, checkpoint)
        try:
            self.close()
            (self._folder / CHECKPOINT).write_bytes(note.encode())
            (self._folder / KEY).write_bytes(f"{verifier}\n".encode())
            (self._folder / PROOF).write_bytes(_proof_lines(proof))
            (self._folder / MANIFEST).write_bytes(_manifest(self._folder, self._part, root, checkpoint))
            for path in (*(self._folder / name for name in FILES), self._folder):
                sync(path)
        except OSError as error:
            raise unwritable(self._folder, error) from error


def verify_archive(folder: Path, trusted: VerifierKey | str | None = None) -> ArchiveReport:
    """Check an archive from its files alone.

    trusted: the log's verifier key from a source other than the archive.

    Raises: FedmeshError(PROOF_INVALID) with the detail `file`, and `entry` where one can be named.
    """
    verify.check_names(folder, FILES)
    raw = verify.read_manifest(folder, FORMAT)
    part = _part(raw)
    verifier = verify.read_key(folder, trusted)
    checkpoint = verify.read_checkpoint(folder, verifier)
    frontier = Frontier()
    for line in verify.lines(folder):
        digest, _ = verify.check_entry(part.first + frontier.size, line)
        frontier.append(digest)
    if frontier.size != 1 << part.level:
        raise verify.invalid(ENTRIES, f"has {frontier.size} entries, and not {1 << part.level}")
    try:
        part.verify(frontier.root(), _read_proof(folder), checkpoint)
    except FedmeshError as error:
        raise verify.invalid(
            ENTRIES,
            f"does not stand under the checkpoint: an entry, the proof or the range was changed: {error.message}",
        ) from None
    if raw != _manifest(folder, part, frontier.root(), checkpoint):
        raise verify.invalid(MANIFEST, "does not describe the files of this archive")
    note = verify.read_text(folder, CHECKPOINT)
    return ArchiveReport(
        part, frontier.root(), checkpoint, note, raw.decode("ascii"), str(verifier), trusted is not None
    )


def is_archive(folder: Path) -> bool:
    """Whether a folder says that it is an archive and no export. It need not be a good one."""
    try:
        return f'"format":"{FORMAT}"'.encode() in (folder / MANIFEST).read_bytes()
    except OSError:
        return False


def read_leaves(folder: Path, part: Part) -> Iterator[tuple[int, bytes]]:
    """Index and leaf of the entries of an archive, in order, each checked against its own hash.

    Raises: FedmeshError(PROOF_INVALID).
    """
    for index, line in enumerate(verify.lines(folder), part.first):
        yield index, verify.check_entry(index, line)[1]


def read_archives(folder: Path, trusted: VerifierKey) -> Iterator[tuple[int, bytes]]:
    """Index and leaf of all entries in a folder of archives that adjoin from entry 0 on, each archive verified first.

    Raises: FedmeshError(PROOF_INVALID), also when the folder has none.
    """
    following = 0
    while found := next(folder.glob(f"entries-{following:012d}-*"), None):
        part = verify_archive(found, trusted).part
        if part.first != following:
            raise FedmeshError(Code.PROOF_INVALID, f"{found} holds entries from {part.first} on")
        yield from read_leaves(found, part)
        following = part.stop
    if not following:
        raise FedmeshError(Code.PROOF_INVALID, f"{folder} has no archive from entry 0 on")


def sync(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk. Raises: OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _manifest(folder: Path, part: Part, root: bytes, checkpoint: Checkpoint) -> bytes:
    try:
        digests = file_digests(folder, (*CONTENT, PROOF))
    except OSError as error:
        raise FedmeshError(Code.PROOF_INVALID, f"the archive cannot be read: {error.strerror}") from error
    value: dict[str, Any] = {
        "files": listed(digests),
        "first": part.first,
        "format": FORMAT,
        "level": part.level,
        "origin": checkpoint.origin,
        "root": root.hex(),
        "size": checkpoint.size,
    }
    return canonical_json(value) + b"\n"


def _part(manifest: bytes) -> Part:
    value = parse_canonical(manifest.removesuffix(b"\n"))
    first, level = value.get("first"), value.get("level")
    if (
        type(first) is not int
        or type(level) is not int
        or not 0 < level <= _MAX_LEVEL
        or first < 0
        or first % (1 << level)
    ):
        raise verify.invalid(MANIFEST, "names no subtree")
    return Part(first, level)


def _proof_lines(proof: Sequence[bytes]) -> bytes:
    return "".join(f"{value.hex()}\n" for value in proof).encode()


def _read_proof(folder: Path) -> list[bytes]:
    text = verify.read_text(folder, PROOF)
    try:
        proof = [bytes.fromhex(line) for line in text.split("\n")[:-1]]
    except ValueError:
        raise verify.invalid(PROOF, "is not made of hashes in hex") from None
    if _proof_lines(proof) != text.encode():
        raise verify.invalid(PROOF, "has lines in another form")
    return proof
