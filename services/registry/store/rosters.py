"""Rosters and the key epochs of their members."""

from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.entities import KeyEpoch, PublishedRoster
from services.secure_sum.roster import as_roster
from services.secure_sum.statements import Signed

_GET: Final = "select statement, signers, signatures, published_by, published_at from registry.rosters"
_EPOCH: Final = "select roster_sha256, epoch, maker, statement, signature, published_at from registry.epochs"


class PostgresRosters:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def add(self, published: PublishedRoster) -> None:
        roster = published.roster
        await self._connection.execute(
            "insert into registry.rosters (version, sha256, statement, members, signers, signatures, published_by,"
            " published_at) values (%s, %s, %s, %s, %s, %s, %s, %s)",
            (
                roster.statement.version,
                roster.sha256,
                published.statement,
                list(roster.ids),
                list(published.signatures),
                list(published.signatures.values()),
                published.published_by,
                published.published_at,
            ),
        )

    async def present(self) -> PublishedRoster | None:
        rows = await self._connection.execute(f"{_GET} order by version desc limit 1")
        row = await rows.fetchone()
        return None if row is None else _roster(row)

    async def get(self, sha256: str) -> PublishedRoster | None:
        rows = await self._connection.execute(f"{_GET} where sha256 = %s", (sha256,))
        row = await rows.fetchone()
        return None if row is None else _roster(row)

    async def after(self, version: int) -> tuple[PublishedRoster, ...]:
        rows = await self._connection.execute(f"{_GET} where version > %s order by version limit 500", (version,))
        return tuple([_roster(row) async for row in rows])

    async def add_epoch(self, epoch: KeyEpoch) -> None:
        await self._connection.execute(
            "insert into registry.epochs (roster_sha256, epoch, maker, statement, signature, published_at)"
            " values (%s, %s, %s, %b, %b, %s)",
            (
                epoch.roster_sha256,
                epoch.epoch,
                epoch.signed.hospital_id,
                epoch.signed.statement,
                epoch.signed.signature,
                epoch.published_at,
            ),
        )

    async def epoch(self, roster_sha256: str, number: int | None) -> KeyEpoch | None:
        rows = await self._connection.execute(
            f"{_EPOCH} where roster_sha256 = %(roster)s and (%(number)s::bigint is null or epoch = %(number)s)"
            " order by epoch desc limit 1",
            {"roster": roster_sha256, "number": number},
        )
        row = await rows.fetchone()
        return None if row is None else _epoch(row)


def _roster(row: dict[str, Any]) -> PublishedRoster:
    statement = bytes(row["statement"])
    signatures = zip(row["signers"], map(bytes, row["signatures"]), strict=True)
    return PublishedRoster(as_roster(statement), statement, dict(signatures), row["published_by"], row["published_at"])


def _epoch(row: dict[str, Any]) -> KeyEpoch:
    signed = Signed(row["maker"], bytes(row["statement"]), bytes(row["signature"]))
    return KeyEpoch(row["roster_sha256"], row["epoch"], signed, row["published_at"])
