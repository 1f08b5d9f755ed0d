"""Operators who invite and hospitals that enrol, at the registry of a test."""

import json
from pathlib import Path
from typing import Any

from fedmesh.registry.v1 import enrolment_pb2 as pb
from fedmesh.registry.v1 import enrolment_pb2_grpc as rpc

from services.cli import enrolling
from services.cli.tokens import Token
from services.common.credentials import CredentialFolder
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.hospital_node.authority import certificate_from
from tests.integration.registry.harness import Registry


class Enrolling:
    """An operator and hospitals at one registry."""

    def __init__(self, registry: Registry, folder: Path) -> None:
        self.registry = registry
        self.folder = folder
        self.address = f"127.0.0.1:{registry.door.port}"
        self.ca = (registry.ca.folder / "ca.pem").read_bytes()
        self.channels: list[MeshChannel] = []

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()

    async def credentials(self) -> Any:
        channel = MeshChannel(f"127.0.0.1:{self.registry.server.port}", self.registry._tls("operator", "alice"))
        self.channels.append(channel)
        return channel.stub(rpc.CredentialServiceStub)

    async def invite(self, hospital: str, valid_s: int = 3600) -> Token:
        token = Token.generate(hospital)
        await self.registry.decide("invite", hospital, token_sha256=token.sha256, valid_s=valid_s)
        return token

    async def enrol(self, token: Token, request: bytes) -> bytes:
        return await enrolling.ask(self.address, self.ca, token, request, 0)

    async def enrolled(self, hospital: str, name: str = "") -> CredentialFolder:
        """A hospital's folder with the certificate of a new invitation."""
        folder = CredentialFolder(self.folder / (name or hospital))
        folder.trust(self.ca)
        folder.install(await self.enrol(await self.invite(hospital), folder.request(hospital)), hospital)
        return folder

    def registry_of(self, folder: CredentialFolder) -> MeshChannel:
        channel = MeshChannel(f"127.0.0.1:{self.registry.server.port}", folder.tls)
        self.channels.append(channel)
        return channel

    async def renew(self, folder: CredentialFolder, request: bytes) -> bytes:
        return await certificate_from(self.registry_of(folder), 20.0, 0)(request)

    async def asks(self, folder: CredentialFolder) -> Any:
        """What a hospital's certificate gets at the registry."""
        async with MeshChannel(f"127.0.0.1:{self.registry.server.port}", folder.tls) as channel:
            return await call(
                channel.stub(rpc.CredentialServiceStub).RenewCertificate,
                pb.RenewCertificateRequest(request_id=new_id(), csr=b""),
            )

    def told(self, *kinds: str) -> list[tuple[str, str, dict[str, Any]]]:
        """(type, subject, body) of what the outbox has of some kinds, oldest first."""
        rows = self.registry.sql("select type, subject, body_json from registry.outbox order by seq")
        return [(kind, subject, json.loads(body)) for kind, subject, body in rows if kind in kinds]

    def age(self, hospital: str) -> None:
        """Make a hospital's newest certificate a day older: a fresh one is not renewed."""
        self.registry.sql(
            "update registry.certificates set issued_at = issued_at - interval '1 day' where hospital_id = %s", hospital
        )
