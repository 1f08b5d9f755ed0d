"""Invitations and issued certificates."""

from dataclasses import astuple
from datetime import datetime
from typing import Any, Final

from services.common.postgres import Statements
from services.registry.domain.enrolment import Certificate, Invitation

_CERTIFICATE: Final = (
    "select hospital_id, serial, csr_sha256, key_sha256, pem, not_before, not_after, issued_at"
    " from registry.certificates"
)


class PostgresCredentials:
    def __init__(self, connection: Statements) -> None:
        self._connection = connection

    async def invite(self, invitation: Invitation) -> None:
        await self.withdraw(invitation.hospital_id, invitation.issued_at)
        await self._connection.execute(
            "insert into registry.invitations (token_sha256, hospital_id, issued_by, issued_at, expires_at)"
            " values (%s, %s, %s, %s, %s)",
            (
                invitation.token_sha256,
                invitation.hospital_id,
                invitation.issued_by,
                invitation.issued_at,
                invitation.expires_at,
            ),
        )

    async def withdraw(self, hospital_id: str, at: datetime) -> None:
        await self._connection.execute(
            "update registry.invitations set withdrawn_at = %s"
            " where hospital_id = %s and used_at is null and withdrawn_at is null",
            (at, hospital_id),
        )

    async def invitation(self, token_sha256: str) -> Invitation | None:
        rows = await self._connection.execute(
            "select token_sha256, hospital_id, issued_by, issued_at, expires_at, withdrawn_at, used_at, serial"
            " from registry.invitations where token_sha256 = %s for update",
            (token_sha256,),
        )
        row = await rows.fetchone()
        return None if row is None else Invitation(**row)

    async def use(self, token_sha256: str, serial: str, at: datetime) -> None:
        await self._connection.execute(
            "update registry.invitations set used_at = %s, serial = %s where token_sha256 = %s",
            (at, serial, token_sha256),
        )

    async def add(self, certificate: Certificate) -> None:
        await self._connection.execute(
            "insert into registry.certificates (hospital_id, serial, csr_sha256, key_sha256, pem, not_before,"
            " not_after, issued_at) values (%s, %s, %s, %s, %s, %s, %s, %s)",
            astuple(certificate),
        )

    async def certificate(self, hospital_id: str, serial: str) -> Certificate | None:
        return await self._one(f"{_CERTIFICATE} where hospital_id = %s and serial = %s", hospital_id, serial)

    async def newest(self, hospital_id: str) -> Certificate | None:
        return await self._one(f"{_CERTIFICATE} where hospital_id = %s order by not_before desc limit 1", hospital_id)

    async def has_key(self, key_sha256: str) -> bool:
        rows = await self._connection.execute(
            "select 1 from registry.certificates where key_sha256 = %s", (key_sha256,)
        )
        return await rows.fetchone() is not None

    async def revoke_before(self, hospital_id: str, moment: datetime) -> None:
        await self._connection.execute(
            "update registry.hospitals set certificates_from = %s where hospital_id = %s", (moment, hospital_id)
        )

    async def _one(self, query: str, *parameters: Any) -> Certificate | None:
        rows = await self._connection.execute(query.encode(), parameters)
        row = await rows.fetchone()
        return None if row is None else Certificate(**row)
