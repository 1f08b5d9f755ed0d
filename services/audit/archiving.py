"""Writes full partitions of the log to archives, straight from the database."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from services.audit.ports import StoredPart, Transaction
from services.audit.store.postgres import PostgresStore
from services.audit.usecases import read_entries
from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.postgres import Database
from services.secure_sum.roster import Roster
from services.transparency.archive import ArchiveWriter, Part, sync, verify_archive
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.cosignature import attach
from services.transparency.merkle import Coordinate, inclusion_nodes, inclusion_proof
from services.transparency.witness import best_witnessed

_PAGE: Final = 100
_PARTIAL: Final = ".partial-"


async def write_archives(
    config: PostgresConfig,
    folder: Path,
    verifier: VerifierKey,
    rosters: Sequence[Roster],
    older_than_months: int,
    say: Callable[[str], None],
) -> int:
    """Write an archive of every partition that is full, witnessed, and of which no entry is younger; how many there are
    now in the folder of those. Any role that may select will do.

    verifier: the log's public key, known from elsewhere than the database. rosters: oldest first. say: takes progress.

    Raises: FedmeshError(NOT_FOUND) when a partition is full and nothing is witnessed yet, (PROOF_INVALID) when the
        stored entries are not those that were signed or an archive in the folder is damaged, (STORE_UNAVAILABLE) when
        the database is away, (INVALID_ARGUMENT | STORE_FULL) when the folder cannot be written.
    """
    database = Database(config)
    await database.open()
    try:
        store = PostgresStore(database)
        full = await store.run("full_parts", lambda tx: tx.full_parts(older_than_months))
        if not full:
            return 0
        note = await _witnessed_note(store, verifier, rosters)
        size = open_checkpoint(note, verifier).size
        written = 0
        for stored in full:
            part = Part(stored.first, stored.level)
            if not stored.aged or part.stop > size:
                why = f"younger than {older_than_months} months" if not stored.aged else "not witnessed yet"
                say(f"{part.folder}: {why}, of {stored.newest:%Y-%m-%d}")
                break
            await _write(store, folder, stored, note, verifier, say)
            written += 1
        return written
    finally:
        await database.close()


async def _write(
    store: PostgresStore,
    folder: Path,
    stored: StoredPart,
    note: str,
    verifier: VerifierKey,
    say: Callable[[str], None],
) -> None:
    part = Part(stored.first, stored.level)
    kept = f"keep until {stored.keep_until:%Y-%m-%d} at least"
    target = folder / part.folder
    if target.exists():
        verify_archive(target, verifier).require(part)
        say(f"{part.folder}: is there and in order; {kept}")
        return
    say(f"{part.folder}: writing {part.stop - part.first} entries ...")
    partial = folder / (_PARTIAL + part.folder)
    # Of a run that was broken off.
    with suppress(FileNotFoundError):
        shutil.rmtree(partial)
    proof = await _proof(store, part, open_checkpoint(note, verifier).size)
    with ArchiveWriter(partial, part) as writer:
        async for index, leaf in read_entries(store, part.first, part.stop):
            writer.add(index, leaf)
        writer.finish(note, proof, verifier)
    verify_archive(partial, verifier).require(part)
    partial.rename(target)
    sync(folder)
    say(f"{part.folder}: written and read back; {kept}")


async def _proof(store: PostgresStore, part: Part, size: int) -> list[bytes]:
    async def read(tx: Transaction) -> list[bytes]:
        hashes = await tx.hashes(inclusion_nodes(part.first, size))
        whole = inclusion_proof(part.first, size, lambda level, position: hashes[Coordinate(level, position)])
        # The first hashes lead from its first entry to the root of the subtree.
        return whole[part.level :]

    return await store.run("archive_proof", read)


async def _witnessed_note(store: PostgresStore, verifier: VerifierKey, rosters: Sequence[Roster]) -> str:
    """The newest checkpoint that a quorum cosigned, with their cosignatures."""
    head = await store.run("checkpoint", lambda tx: tx.head())
    before = 0 if head is None else head.size + 1
    while before:
        page = await store.run("cosigned", lambda tx, before=before: tx.cosigned(before, _PAGE))  # type: ignore[misc]
        for found in page:
            note = attach(found.note, (one.line for one in found.cosigned))
            open_checkpoint(note, verifier)
            if best_witnessed(note, rosters).complete:
                return note
        before = page[-1].size if page else 0
    raise FedmeshError(Code.NOT_FOUND, "no checkpoint is witnessed yet: see `fedmesh audit status`")
