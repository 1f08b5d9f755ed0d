"""The registry as this hospital's certificate authority."""

import uuid
from collections.abc import Awaitable, Callable
from typing import Final

from fedmesh.registry.v1 import enrolment_pb2 as pb
from fedmesh.registry.v1 import enrolment_pb2_grpc as rpc

from services.common.grpc.client import MeshChannel, call

_PATIENCE_S: Final = 30.0
_REQUESTS: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://fedmesh/hospital-node/renewals")


def certificate_from(
    registry: MeshChannel, timeout_s: float, patience_s: float = _PATIENCE_S
) -> Callable[[bytes], Awaitable[bytes]]:
    """Asks for the next certificate; a signing request that is sent twice is one request.

    timeout_s: deadline of each try. patience_s: how long a registry that is away is waited for.
    """
    stub = registry.stub(rpc.CredentialServiceStub)

    async def ask(csr: bytes) -> bytes:
        request = pb.RenewCertificateRequest(request_id=str(uuid.uuid5(_REQUESTS, csr.hex())), csr=csr)
        answer = await call(stub.RenewCertificate, request, timeout_s=timeout_s, patience_s=patience_s)
        return bytes(answer.certificate_pem)

    return ask
