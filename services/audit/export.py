"""Exports the log straight from the database, for when no audit service runs."""

from pathlib import Path

from services.audit.ports import Head, Transaction
from services.audit.store.postgres import PostgresStore
from services.audit.usecases import read_entries
from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.postgres import Database
from services.transparency.checkpoint import Checkpoint, VerifierKey
from services.transparency.export import ExportWriter


async def export_log(config: PostgresConfig, folder: Path, verifier: VerifierKey) -> Checkpoint:
    """Write an export of the log up to its newest checkpoint. Any role that may select will do.

    verifier: the log's public key, known from elsewhere than the database.

    Raises: FedmeshError(NOT_FOUND) for a log without entries, (PROOF_INVALID) when the stored entries are not those
        that were signed, (STORE_UNAVAILABLE) when the database is away, and as `ExportWriter` does.
    """
    database = Database(config)
    await database.open()
    try:
        store = PostgresStore(database)
        head = await store.run("checkpoint", _head)
        with ExportWriter(folder) as writer:
            async for index, leaf in read_entries(store, 0, head.size):
                writer.add(index, leaf)
            return writer.finish(head.note, verifier)
    finally:
        await database.close()


async def _head(tx: Transaction) -> Head:
    head = await tx.head()
    if head is None:
        raise FedmeshError(Code.NOT_FOUND, "the audit log has no entries yet")
    return head
