"""Blobs as rows of at most 1 MiB."""

from collections.abc import Iterable
from datetime import datetime
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.entities import BlobHeader


class PostgresBlobs:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def size_in_job(self, job_id: UUID, sha256: str) -> int | None:
        rows = await self._connection.execute(
            "select b.size_bytes from registry.job_blobs j join registry.blobs b using (sha256)"
            " where j.job_id = %s and j.sha256 = %s",
            (job_id, sha256),
        )
        row = await rows.fetchone()
        return None if row is None else int(row["size_bytes"])

    async def add(self, header: BlobHeader, hospital_id: str, chunks: Iterable[bytes], at: datetime) -> None:
        # The link comes first: row-level security lets a hospital write and see only blobs of its own jobs.
        await self._connection.execute(
            "insert into registry.job_blobs (job_id, sha256, hospital_id, created_at) values (%s, %s, %s, %s)",
            (header.job_id, header.sha256, hospital_id, at),
        )
        added = await self._connection.execute(
            "insert into registry.blobs (sha256, size_bytes, created_at) values (%s, %s, %s) on conflict do nothing",
            (header.sha256, header.size_bytes, at),
        )
        if added.rowcount == 0:  # another job has the same content
            return
        for position, chunk in enumerate(chunks):
            await self._connection.execute(
                "insert into registry.blob_chunks (sha256, position, content) values (%s, %s, %b)",
                (header.sha256, position, chunk),
            )

    async def size(self, sha256: str) -> int | None:
        rows = await self._connection.execute("select size_bytes from registry.blobs where sha256 = %s", (sha256,))
        row = await rows.fetchone()
        return None if row is None else int(row["size_bytes"])

    async def chunk(self, sha256: str, position: int) -> bytes | None:
        rows = await self._connection.execute(
            "select content from registry.blob_chunks where sha256 = %s and position = %s",
            (sha256, position),
            binary=True,
        )
        row = await rows.fetchone()
        return None if row is None else bytes(row["content"])
