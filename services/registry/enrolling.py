"""gRPC adapters of enrolment: for strangers, and for those who have a certificate."""

from datetime import datetime
from typing import Any

from fedmesh.registry.v1 import enrolment_pb2 as pb
from fedmesh.registry.v1 import enrolment_pb2_grpc as rpc

from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.ids import require_name
from services.registry import wire
from services.registry.domain.enrolment import Certificate
from services.registry.usecases.enrolment import EnrolmentUseCases
from services.registry.usecases.ports import Command


class EnrolmentServicer(rpc.EnrolmentServiceServicer):
    """For whoever has a token."""

    def __init__(self, enrolment: EnrolmentUseCases) -> None:
        self._enrolment = enrolment

    async def Enrol(self, request: pb.EnrolRequest, _context: Any) -> pb.EnrolResponse:
        pem = await self._enrolment.enrol(request.token, request.csr)
        return pb.EnrolResponse(certificate_pem=pem.encode())


class CredentialServicer(rpc.CredentialServiceServicer):
    """enrolment: None when the hospitals of this registry get their certificates elsewhere."""

    def __init__(self, enrolment: EnrolmentUseCases | None) -> None:
        self._usecases = enrolment

    @property
    def _enrolment(self) -> EnrolmentUseCases:
        if self._usecases is None:
            raise FedmeshError(
                Code.WRONG_STATE, "this registry issues no certificates: its configuration has no section `enrolment`"
            )
        return self._usecases

    async def InviteHospital(self, _request: pb.InviteHospitalRequest, _context: Any) -> pb.InviteHospitalResponse:
        raise FedmeshError(
            Code.PERMISSION_DENIED,
            "an invitation takes two people: one proposes, another approves (`fedmesh members invite`, `approve`, of"
            " this release or a newer one)",
        )

    async def RenewCertificate(self, request: pb.RenewCertificateRequest, _context: Any) -> pb.RenewCertificateResponse:
        command: Command[Certificate] = wire.command(
            request,
            caller(),
            "RenewCertificate",
            lambda c: pb.RenewCertificateResponse(certificate_pem=c.pem.encode()),
        )
        return pb.RenewCertificateResponse.FromString(await self._enrolment.renew(command, request.csr))

    async def RevokeCertificates(
        self, request: pb.RevokeCertificatesRequest, _context: Any
    ) -> pb.RevokeCertificatesResponse:
        command: Command[datetime] = wire.command(
            request,
            caller(),
            "RevokeCertificates",
            lambda moment: pb.RevokeCertificatesResponse(certificates_from=wire.timestamp(moment)),
        )
        name = require_name(request.hospital_id, "hospital_id")
        reason = wire.require_text(request.reason, "reason", 500)
        return pb.RevokeCertificatesResponse.FromString(await self._enrolment.revoke(command, name, reason))
