"""An export of a log: four files in a folder, which `services.transparency.verify` checks with nothing else at hand.

- `entries.jsonl`: one line an entry, in order: canonical JSON `{"index","leaf","leaf_hash"}`; `leaf` is the text that
  was hashed, `leaf_hash` its leaf hash in hex.
- `checkpoint`: the signed checkpoint over exactly these entries.
- `log.vkey`: the log's verifier key, one line.
- `manifest.json`: canonical JSON with the format, the checkpoint's facts, and size and SHA-256 of the other files.

Nothing in it depends on when or where it was written: exports of one checkpoint are equal, byte for byte.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from services.common.errors import Code, FedmeshError
from services.transparency.canonical import canonical_json
from services.transparency.checkpoint import Checkpoint, VerifierKey, open_checkpoint
from services.transparency.merkle import Frontier, leaf_hash

FORMAT: Final = "fedmesh-audit-export/1"
ENTRIES: Final = "entries.jsonl"
CHECKPOINT: Final = "checkpoint"
KEY: Final = "log.vkey"
MANIFEST: Final = "manifest.json"
CONTENT: Final = (CHECKPOINT, ENTRIES, KEY)
"""The files that the manifest lists."""
FILES: Final = (*CONTENT, MANIFEST)

_BLOCK: Final = 1 << 20


class EntriesWriter:
    """Writes `entries.jsonl` in a folder that is there, entry by entry, in constant memory: `add` all in order.

    Used as a context manager. first: index of the first entry. frontier: the tree of what was added.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """Raises: OSError."""
        self._folder = folder
        self._first = first
        self.frontier = Frontier()
        self._file = (folder / ENTRIES).open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, index: int, leaf: bytes) -> None:
        """Write the next entry. `leaf` is the exact bytes that were hashed.

        Raises: FedmeshError(PROOF_INVALID) when it is not the next entry or not text; (STORE_FULL) without room.
        """
        expected = self._first + self.frontier.size
        if index != expected:
            raise FedmeshError(Code.PROOF_INVALID, f"entry {index} came where entry {expected} belongs", entry=index)
        try:
            line = entry_line(index, leaf)
        except ValueError:
            raise FedmeshError(Code.PROOF_INVALID, f"entry {index} is not UTF-8 text", entry=index) from None
        try:
            self._file.write(line)
        except OSError as error:
            raise unwritable(self._folder, error) from error
        self.frontier.append(leaf_hash(leaf))

    def close(self) -> None:
        """Raises: OSError when what is left cannot be written."""
        self._file.close()


class ExportWriter(EntriesWriter):
    """Writes an export entry by entry: `add` every entry, then `finish` once; for sources that are streams.

    Without `finish` there is no manifest, and such a folder verifies as nothing.
    """

    def __init__(self, folder: Path) -> None:
        """Raises: FedmeshError(ALREADY_EXISTS) when the folder has content, (INVALID_ARGUMENT) when it is unusable,
        (STORE_FULL) without room."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise FedmeshError(Code.ALREADY_EXISTS, f"{folder} is not empty: choose a new folder for the export")
            super().__init__(folder, 0)
        except OSError as error:
            raise unwritable(folder, error) from error

    def finish(self, note: str, verifier: VerifierKey) -> Checkpoint:
        """Check the entries against the signed checkpoint and complete the export.

        Raises: FedmeshError(PROOF_INVALID) when the signature is wrong, or the checkpoint is not over these entries;
            (STORE_FULL) without room.
        """
        checkpoint = open_checkpoint(note, verifier)
        if (checkpoint.size, checkpoint.root) != (self.frontier.size, self.frontier.root()):
            raise FedmeshError(
                Code.PROOF_INVALID,
                f"the {self.frontier.size} entries are not those of the checkpoint over {checkpoint.size} entries",
            )
        try:
            self.close()
            (self._folder / CHECKPOINT).write_bytes(note.encode())
            (self._folder / KEY).write_bytes(f"{verifier}\n".encode())
            (self._folder / MANIFEST).write_bytes(manifest(self._folder, checkpoint))
        except OSError as error:
            raise unwritable(self._folder, error) from error
        return checkpoint


def write_export(folder: Path, entries: Iterable[tuple[int, bytes]], note: str, verifier: VerifierKey) -> Checkpoint:
    """Write an export of `entries` (index and leaf bytes, from 0) under the signed checkpoint `note`.

    Raises: FedmeshError as `ExportWriter` does.
    """
    with ExportWriter(folder) as writer:
        for index, leaf in entries:
            writer.add(index, leaf)
        return writer.finish(note, verifier)


def entry_line(index: int, leaf: bytes) -> bytes:
    """The line of an entry in `entries.jsonl`.

    Raises: ValueError when the leaf is not UTF-8.
    """
    value: dict[str, Any] = {"index": index, "leaf": leaf.decode("utf-8"), "leaf_hash": leaf_hash(leaf).hex()}
    return canonical_json(value) + b"\n"


def manifest(folder: Path, checkpoint: Checkpoint) -> bytes:
    """The manifest that belongs to the files in a folder.

    Raises: OSError when one of them cannot be read.
    """
    value: dict[str, Any] = {
        "files": listed(file_digests(folder)),
        "format": FORMAT,
        "origin": checkpoint.origin,
        "root": checkpoint.root.hex(),
        "size": checkpoint.size,
    }
    return canonical_json(value) + b"\n"


def listed(digests: Mapping[str, tuple[int, str]]) -> dict[str, Any]:
    """What a manifest says of files."""
    return {name: {"bytes": size, "sha256": digest} for name, (size, digest) in digests.items()}


def file_digests(folder: Path, names: Sequence[str] = CONTENT) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 in hex of every listed file.

    Raises: OSError when one of them cannot be read.
    """
    digests = {}
    for name in names:
        size, digest = 0, hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                size += len(block)
                digest.update(block)
        digests[name] = (size, digest.hexdigest())
    return digests


def unwritable(folder: Path, error: OSError) -> FedmeshError:
    """Why a folder could not be written."""
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return FedmeshError(Code.STORE_FULL, f"no space left for the export in {folder}")
    return FedmeshError(Code.INVALID_ARGUMENT, f"cannot write the export into {folder}: {error.strerror}")
