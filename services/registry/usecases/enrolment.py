"""How a hospital gets its first certificate by a one-time token, its next ones by the one before, and loses them."""

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from prometheus_client import Counter

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.registry.domain.enrolment import (
    MAX_TOKEN_CHARACTERS,
    Certificate,
    Invitation,
    SigningRequest,
    beginning,
    csr_digest,
    read_request,
    require_due,
    require_usable,
    revocation,
    token_digest,
)
from services.registry.domain.entities import Event, Hospital, HospitalStatus
from services.registry.domain.events import event
from services.registry.usecases.hospitals import find_hospital
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction

_ISSUED = Counter("fedmesh_registry_certificates_issued_total", "Certificates of hospitals", ["by"])
_REFUSED = Counter("fedmesh_registry_enrolments_refused_total", "Enrolments and renewals refused, by error", ["code"])


class Signer(Protocol):
    def sign(self, request: SigningRequest, identity: Identity, begins: datetime, ends: datetime) -> Certificate:
        """Certify a key under a name. Raises: FedmeshError(CONFIG_INVALID)."""
        ...


@dataclass(frozen=True)
class Terms:
    """lifetime: of a certificate. backdate: how far in the past it begins. registry: who speaks for strangers."""

    lifetime: timedelta
    backdate: timedelta
    registry: Identity


class EnrolmentUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock, signer: Signer, terms: Terms) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock
        self._signer = signer
        self._terms = terms

    async def enrol(self, token: str, csr: bytes) -> str:
        """The first certificate, PEM; all that the hospital had before are revoked.

        The same token with the same request gets the same certificate as long as that is valid.

        Raises: FedmeshError(PERMISSION_DENIED) for a token that is not usable, another's name or a hospital that is
            not active, (INVALID_ARGUMENT | TOO_LARGE) for a request that is not in order, (WRONG_STATE) for a key that
            was certified before.
        """
        known: list[Invitation] = []

        async def body(tx: Transaction) -> str:
            known.clear()
            found = await tx.credentials.invitation(token_digest(token))
            if found is not None:
                known.append(found)
            given = await self._given(tx, found, csr)
            if given is not None:
                return given.pem
            invitation = require_usable(found, self._clock.now())
            caller = Identity(self._terms.registry.consortium, Kind.HOSPITAL, invitation.hospital_id)
            hospital = await _active(tx, invitation.hospital_id)
            made = await self._certify(tx, hospital, caller, csr)
            await tx.credentials.use(invitation.token_sha256, made.serial, made.issued_at)
            await tx.credentials.revoke_before(hospital.hospital_id, made.not_before)
            token_facts = {"token_sha256": invitation.token_sha256}
            await tx.outbox.add([_issued("hospital.enrolled", caller, made, **token_facts)])
            return made.pem

        try:
            if len(token) > MAX_TOKEN_CHARACTERS:
                raise FedmeshError(Code.TOO_LARGE, "this is no token: it is too long")
            pem = await self._store.run("Enrol", None, body)
        except FedmeshError as error:
            subject = known[0].hospital_id if known else ""
            await self._note("enrolment.refused", self._terms.registry, subject, error, token_digest(token))
            raise
        self._mutations.changed()
        _ISSUED.labels("enrolment").inc()
        return pem

    async def renew(self, command: Command[Certificate], csr: bytes) -> bytes:
        """The next certificate of the calling hospital.

        Raises: FedmeshError(PERMISSION_DENIED) for a hospital that is not active or names another, (RATE_LIMITED) when
            it has a fresh one; else as `enrol`.
        """
        caller = command.caller

        async def body(tx: Transaction) -> Certificate:
            hospital = await _active(tx, caller.name)
            require_due(await tx.credentials.newest(caller.name), self._clock.now())
            made = await self._certify(tx, hospital, caller, csr)
            await tx.outbox.add([_issued("certificate.renewed", caller, made)])
            return made

        try:
            answer = await self._mutations.run(command, body, whole=True)
        except FedmeshError as error:
            await self._note("call.refused", caller, caller.name, error)
            raise
        _ISSUED.labels("renewal").inc()
        return answer

    async def revoke(self, command: Command[datetime], hospital_id: str, reason: str) -> bytes:
        """Make everything that a hospital has worthless: certificates, whoever issued them, and an open invitation.

        Raises: FedmeshError(NOT_FOUND).
        """

        async def body(tx: Transaction) -> datetime:
            await find_hospital(tx, hospital_id)
            now = self._clock.now()
            newest = await tx.credentials.newest(hospital_id)
            since = beginning(now, timedelta(), newest, revocation(now))
            await tx.credentials.revoke_before(hospital_id, since)
            await tx.credentials.withdraw(hospital_id, now)
            facts = {"certificates_from": since.isoformat(), "reason": reason}
            await tx.outbox.add([_event("certificates.revoked", now, command.caller, hospital_id, **facts)])
            return since

        return await self._mutations.run(command, body)

    async def _given(self, tx: Transaction, found: Invitation | None, csr: bytes) -> Certificate | None:
        """The certificate that this token and this request got before, if it still counts."""
        if found is None or found.serial is None:
            return None
        hospital = await _active(tx, found.hospital_id)
        given = await tx.credentials.certificate(found.hospital_id, found.serial)
        if given is None or given.csr_sha256 != csr_digest(csr) or self._clock.now() >= given.not_after:
            return None
        revoked = hospital.certificates_from is not None and given.not_before < hospital.certificates_from
        return None if revoked else given

    async def _certify(self, tx: Transaction, hospital: Hospital, caller: Identity, csr: bytes) -> Certificate:
        request = read_request(csr, caller)
        if await tx.credentials.has_key(request.key_sha256):
            raise FedmeshError(Code.WRONG_STATE, "this key has a certificate already: make a new key")
        now = self._clock.now()
        newest = await tx.credentials.newest(hospital.hospital_id)
        begins = beginning(now, self._terms.backdate, newest, hospital.certificates_from)
        made = self._signer.sign(request, caller, begins, now + self._terms.lifetime)
        await tx.credentials.add(made)
        return made

    async def _note(
        self, kind: str, actor: Identity, hospital_id: str, error: FedmeshError, token_sha256: str = ""
    ) -> None:
        """Tell the audit log of a refusal, whatever the standing of the refused."""
        _REFUSED.labels(error.code.value).inc()
        if error.retryable:
            return
        facts = {"method": "Enrol" if token_sha256 else "RenewCertificate", "code": error.code.value}
        facts |= {"reason": error.message} | ({"token_sha256": token_sha256} if token_sha256 else {})
        subject = f"hospital/{hospital_id}" if hospital_id else "enrolment/unknown"
        told = event(kind, self._clock.now(), actor, subject, **facts)
        await self._store.run("Enrol.refused", None, lambda tx: tx.outbox.add([told]))
        self._mutations.changed()


async def _active(tx: Transaction, hospital_id: str) -> Hospital:
    hospital = await find_hospital(tx, hospital_id)
    if hospital.status is not HospitalStatus.ACTIVE:
        raise FedmeshError(
            Code.PERMISSION_DENIED, f"hospital {hospital_id} is {hospital.status.value}: ask the consortium"
        )
    return hospital


def _issued(kind: str, caller: Identity, made: Certificate, **facts: object) -> Event:
    told = {"serial": made.serial, "key_sha256": made.key_sha256, "not_after": made.not_after.isoformat(), **facts}
    return _event(kind, made.issued_at, caller, made.hospital_id, **told)


def _event(kind: str, at: datetime, caller: Identity, hospital_id: str, **facts: object) -> Event:
    return event(kind, at, caller, f"hospital/{hospital_id}", **facts)
