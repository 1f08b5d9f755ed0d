"""Rosters and the key epochs of their members."""

from collections.abc import Sequence
from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.entities import (
    EpochRecords,
    HospitalStatus,
    KeyEpoch,
    MemberStanding,
    PublishedRoster,
)
from services.secure_sum.roster import as_roster
from services.secure_sum.statements import Signed

_GET: Final = "select statement, signers, signatures, published_by, published_at from registry.rosters"
_EPOCH: Final = "select roster_sha256, epoch, maker, statement, signature, published_at from registry.epochs"
# The members' columns are arrays of one length.
_RECORDS: Final = """
    with present as (select sha256, published_at, members from registry.rosters order by version desc limit 1)
    select present.sha256, present.published_at, standing.*,
        %(roster)s = '' or exists (select from registry.rosters where sha256 = %(roster)s) as known,
        (select min(created_at) from registry.plans where status = 'approved' and parameter_set = any(%(sets)s))
            as public_since,
        newest.epoch as newest_epoch, newest.maker as newest_maker, newest.statement as newest_statement,
        newest.signature as newest_signature, newest.published_at as newest_published_at,
        found.roster_sha256 as found_roster_sha256, found.epoch as found_epoch, found.maker as found_maker,
        found.statement as found_statement, found.signature as found_signature,
        found.published_at as found_published_at
    from present
    cross join lateral (
        select array_agg(hospital_id::text) as hospital_ids, array_agg(status) as statuses,
            array_agg(standing_at) as standings
        from (select * from registry.hospitals where hospital_id = any(present.members) order by hospital_id) as h
    ) as standing
    left join lateral (
        select * from registry.epochs where roster_sha256 = present.sha256 order by epoch desc limit 1
    ) as newest on true
    left join lateral (
        select * from registry.epochs
        where roster_sha256 = coalesce(nullif(%(roster)s, ''), present.sha256)
            and (%(number)s::bigint = 0 or epoch = %(number)s)
        order by epoch desc limit 1
    ) as found on true
"""


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

    async def epoch_records(
        self, roster_sha256: str, number: int, parameter_sets: Sequence[str]
    ) -> EpochRecords | None:
        rows = await self._connection.execute(
            _RECORDS, {"roster": roster_sha256, "number": number, "sets": list(parameter_sets)}
        )
        row = await rows.fetchone()
        if row is None:
            return None
        members = zip(row["hospital_ids"] or (), row["statuses"] or (), row["standings"] or (), strict=True)
        found = {name.removeprefix("found_"): value for name, value in row.items() if name.startswith("found_")}
        newest = {name.removeprefix("newest_"): value for name, value in row.items() if name.startswith("newest_")}
        return EpochRecords(
            roster_sha256=row["sha256"],
            roster_published_at=row["published_at"],
            roster_known=row["known"],
            found=None if found["epoch"] is None else _epoch(found),
            newest=None if newest["epoch"] is None else _epoch({**newest, "roster_sha256": row["sha256"]}),
            members=tuple(MemberStanding(name, HospitalStatus(status), at) for name, status, at in members),
            public_since=row["public_since"],
        )


def _roster(row: dict[str, Any]) -> PublishedRoster:
    statement = bytes(row["statement"])
    signatures = zip(row["signers"], map(bytes, row["signatures"]), strict=True)
    return PublishedRoster(as_roster(statement), statement, dict(signatures), row["published_by"], row["published_at"])


def _epoch(row: dict[str, Any]) -> KeyEpoch:
    signed = Signed(row["maker"], bytes(row["statement"]), bytes(row["signature"]))
    return KeyEpoch(row["roster_sha256"], row["epoch"], signed, row["published_at"])
