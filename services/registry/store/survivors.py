"""Confirmed survivors of attempts."""

import hashlib
from typing import Any
from uuid import UUID

from services.common.postgres import Statements
from services.registry.domain.entities import SurvivorList


class PostgresSurvivors:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, told: SurvivorList) -> None:
        await self._connection.execute(
            "insert into registry.survivors (job_id, round, attempt, sha256, statement, signers, signatures, details,"
            " stored_at) values (%s, %s, %s, %s, %s, %s, %s, %b, %s)",
            (
                told.job_id,
                told.round,
                told.attempt,
                hashlib.sha256(told.statement).hexdigest(),
                told.statement,
                list(told.confirmations),
                list(told.confirmations.values()),
                told.details,
                told.stored_at,
            ),
        )

    async def get(self, job_id: UUID, round_number: int, *, details: bool = False) -> SurvivorList | None:
        rows = await self._connection.execute(
            "select job_id, round, attempt, statement, signers, signatures, stored_at,"
            " case when %s then details end as details from registry.survivors where job_id = %s and round = %s",
            (details, job_id, round_number),
            binary=True,
        )
        row = await rows.fetchone()
        return None if row is None else _survivors(row)

    async def drop_details(self, job_id: UUID) -> None:
        await self._connection.execute(
            "update registry.survivors set details = null where job_id = %s and details is not null", (job_id,)
        )


def _survivors(row: dict[str, Any]) -> SurvivorList:
    return SurvivorList(
        job_id=row["job_id"],
        round=row["round"],
        attempt=row["attempt"],
        statement=bytes(row["statement"]),
        confirmations=dict(zip(row["signers"], map(bytes, row["signatures"]), strict=True)),
        details=bytes(row["details"] or b""),
        stored_at=row["stored_at"],
    )
