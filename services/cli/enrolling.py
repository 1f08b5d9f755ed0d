"""The call that enrols a hospital: server-only TLS, because the caller has no certificate yet."""

import re
from typing import Final

import grpc
from fedmesh.registry.v1 import enrolment_pb2 as pb
from fedmesh.registry.v1 import enrolment_pb2_grpc as rpc

from services.cli.tokens import Token
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call

_ADDRESS: Final = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):\d{1,5}")


async def ask(address: str, ca_pem: bytes, token: Token, csr: bytes, patience_s: float) -> bytes:
    """The certificate (PEM) for a signing request (DER).

    patience_s: how long a registry that is away is waited for.

    Raises: FedmeshError as the registry raised it; (SERVICE_UNAVAILABLE) saying what to check; (INVALID_ARGUMENT) for
        an address that is none.
    """
    if not _ADDRESS.fullmatch(address):
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--registry {address}: use HOST:PORT, as in the invitation")
    async with grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca_pem)) as channel:
        request = pb.EnrolRequest(token=token.text, csr=csr)
        try:
            answer = await call(rpc.EnrolmentServiceStub(channel).Enrol, request, patience_s=patience_s)
        except FedmeshError as error:
            if error.code is not Code.SERVICE_UNAVAILABLE:
                raise
            raise FedmeshError(
                Code.SERVICE_UNAVAILABLE,
                f"no registry at {address} that the authority vouches for ({error.message}): check the address, that it"
                " is the one for enrolment, the file with the authority, and the network; then try again",
            ) from error
    return bytes(answer.certificate_pem)
