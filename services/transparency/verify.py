"""The offline verifier: checks an export of the log from its files alone, with no service and no trust in one.

What is checked: every file is the one that the manifest lists, and no other file is there; every entry stands in its
place, in canonical form, under its leaf hash; the Merkle root over all entries (RFC 9162, 2.1.1) is the checkpoint's;
the checkpoint is signed by the log's key. What that proves depends on where the key came from: see `Report.statement`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.transparency import export
from services.transparency.canonical import canonical_json, parse_canonical
from services.transparency.checkpoint import (
    MAX_NOTE_BYTES,
    Checkpoint,
    VerifierKey,
    open_checkpoint,
    parse_verifier_key,
)
from services.transparency.merkle import Frontier, leaf_hash

# Bodies have at most 64 KiB; quoted twice, and with every character escaped, they stay below this.
MAX_LINE_BYTES: Final = 1 << 20
_LINE_KEYS: Final = {"index", "leaf", "leaf_hash"}


@dataclass(frozen=True)
class Report:
    """What an export proves. `trusted`: the key was given by the caller, not taken from the export."""

    origin: str
    size: int
    root: str
    key: str
    trusted: bool

    @property
    def statement(self) -> str:
        """The result in words, with its limits."""
        proven = f"All {self.size} entries of {self.origin} are in their places under root {self.root}"
        if self.trusted:
            return f"{proven}, signed by the key that you trust, {self.key}."
        return (
            f"{proven}, signed by the key inside the export, {self.key}. This shows only that the export agrees with "
            "itself: whoever writes an export can also make a key. Compare the key with the one that your consortium "
            "published, or pass that one to the verifier."
        )


def verify_export(folder: Path, trusted: VerifierKey | str | None = None) -> Report:
    """Check an export.

    trusted: the log's verifier key from a source other than the export.

    Raises: FedmeshError(PROOF_INVALID) with the detail `file`, and `entry` where one can be named.
    """
    check_names(folder, export.FILES)
    manifest = read_manifest(folder, export.FORMAT)
    verifier = read_key(folder, trusted)
    checkpoint = read_checkpoint(folder, verifier)
    _check_entries(folder, checkpoint)
    _check_manifest(folder, manifest, checkpoint)
    return Report(checkpoint.origin, checkpoint.size, checkpoint.root.hex(), str(verifier), trusted is not None)


def check_names(folder: Path, files: Sequence[str]) -> None:
    """Raises: FedmeshError(PROOF_INVALID) unless these files are in the folder, and no other."""
    try:
        present = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise FedmeshError(Code.PROOF_INVALID, f"cannot read {folder}: {error.strerror}", file=str(folder)) from error
    for name in files:
        if name not in present:
            raise invalid(name, "is missing")
    unlisted = sorted(present - set(files))
    if unlisted:
        raise invalid(unlisted[0], "is not part of the export")


def read_manifest(folder: Path, form: str) -> bytes:
    """The manifest, which must be of this format. Raises: FedmeshError(PROOF_INVALID)."""
    raw = _read_small(folder, export.MANIFEST)
    try:
        value = parse_canonical(raw.removesuffix(b"\n"))
    except ValueError as error:
        raise invalid(export.MANIFEST, f"is not a manifest: {error}") from None
    if value.get("format") != form:
        raise invalid(export.MANIFEST, f"is not of format {form}")
    return raw


def read_key(folder: Path, trusted: VerifierKey | str | None) -> VerifierKey:
    """The key, which must be the trusted one if there is one. Raises: FedmeshError(PROOF_INVALID)."""
    text = read_text(folder, export.KEY)
    try:
        key = parse_verifier_key(text.removesuffix("\n"))
    except FedmeshError as error:
        raise invalid(export.KEY, f"holds no key: {error.message}") from None
    if text != f"{key}\n":
        raise invalid(export.KEY, "is more or less than one line with a key")
    if trusted is None:
        return key
    expected = parse_verifier_key(trusted.strip()) if isinstance(trusted, str) else trusted
    if key != expected:
        raise invalid(export.KEY, f"holds another key, {key}, than the one you trust, {expected}")
    return expected


def read_checkpoint(folder: Path, verifier: VerifierKey) -> Checkpoint:
    """The checkpoint, its signature checked. Raises: FedmeshError(PROOF_INVALID)."""
    try:
        return open_checkpoint(read_text(folder, export.CHECKPOINT), verifier)
    except FedmeshError as error:
        raise invalid(export.CHECKPOINT, f"is not valid: {error.message}") from None


def _check_entries(folder: Path, checkpoint: Checkpoint) -> None:
    frontier = Frontier()
    for line in lines(folder):
        frontier.append(check_entry(frontier.size, line)[0])
    if frontier.size != checkpoint.size:
        raise invalid(export.ENTRIES, f"has {frontier.size} entries, but the checkpoint covers {checkpoint.size}")
    if frontier.root() != checkpoint.root:
        raise invalid(
            export.ENTRIES, "gives another root than the checkpoint: an entry was changed, left out, added or moved"
        )


def check_entry(index: int, line: bytes) -> tuple[bytes, bytes]:
    """Leaf hash and leaf of a line, once everything in the line is checked. Raises: FedmeshError(PROOF_INVALID)."""
    try:
        value = parse_canonical(line.removesuffix(b"\n"))
    except ValueError as error:
        raise invalid(export.ENTRIES, f"is damaged at entry {index}: {error}", entry=index) from None
    leaf = value.get("leaf")
    if value.keys() != _LINE_KEYS or not isinstance(leaf, str) or value["index"] != index:
        raise invalid(export.ENTRIES, f"has no entry {index} in its place", entry=index)
    try:
        parse_canonical(leaf.encode("utf-8"))
    except ValueError as error:
        raise invalid(export.ENTRIES, f"has a wrong leaf at entry {index}: {error}", entry=index) from None
    digest = leaf_hash(leaf.encode("utf-8"))
    if value["leaf_hash"] != digest.hex():
        raise invalid(export.ENTRIES, f"has a leaf that does not match its hash at entry {index}", entry=index)
    if export.entry_line(index, leaf.encode("utf-8")) != line:
        raise invalid(export.ENTRIES, f"has a line in another form at entry {index}", entry=index)
    return digest, leaf.encode("utf-8")


def _check_manifest(folder: Path, manifest: bytes, checkpoint: Checkpoint) -> None:
    """The manifest must be, to the byte, the one that belongs to these files; say which file differs when it is not."""
    try:
        expected = export.manifest(folder, checkpoint)
    except OSError as error:
        raise FedmeshError(Code.PROOF_INVALID, f"the export cannot be read: {error.strerror}") from error
    if manifest == expected:
        return
    stated, found = _listed_files(manifest), _listed_files(expected)
    differing = [name for name in export.CONTENT if stated.get(name) != found[name]]
    if len(differing) == 1 and stated.keys() == found.keys():
        raise invalid(differing[0], f"and what {export.MANIFEST} says of it differ")
    raise invalid(export.MANIFEST, "does not describe the files of this export")


def _listed_files(manifest: bytes) -> dict[str, Any]:
    files = json.loads(manifest).get("files")
    return {name: canonical_json({"": item}) for name, item in files.items()} if isinstance(files, dict) else {}


def lines(folder: Path) -> Iterator[bytes]:
    """The lines of the entries. Raises: FedmeshError(PROOF_INVALID)."""
    try:
        with (folder / export.ENTRIES).open("rb") as file:
            number = 0
            while line := file.readline(MAX_LINE_BYTES + 1):
                if len(line) > MAX_LINE_BYTES or not line.endswith(b"\n"):
                    raise invalid(export.ENTRIES, f"is damaged at entry {number}: no end of line", entry=number)
                yield line
                number += 1
    except OSError as error:
        raise invalid(export.ENTRIES, f"cannot be read: {error.strerror}") from error


def read_text(folder: Path, name: str) -> str:
    """A small text file. Raises: FedmeshError(PROOF_INVALID)."""
    try:
        return _read_small(folder, name).decode("utf-8")
    except UnicodeDecodeError:
        raise invalid(name, "is not UTF-8 text") from None


def _read_small(folder: Path, name: str) -> bytes:
    try:
        with (folder / name).open("rb") as file:
            raw = file.read(MAX_NOTE_BYTES + 1)
    except OSError as error:
        raise invalid(name, f"cannot be read: {error.strerror}") from error
    if len(raw) > MAX_NOTE_BYTES:
        raise invalid(name, f"is larger than {MAX_NOTE_BYTES} bytes")
    return raw


def invalid(name: str, problem: str, **detail: object) -> FedmeshError:
    """What is wrong with a file."""
    return FedmeshError(Code.PROOF_INVALID, f"{name} {problem}", file=name, **detail)
