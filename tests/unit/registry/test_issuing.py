"""The registry's authority: what it refuses to start with, and that services believe what it signs."""

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc

from services.common.clock import FakeClock, SystemClock
from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.common.identity import Identity, Kind
from services.embedded.ca import create_ca
from services.registry.domain.enrolment import read_request
from services.registry.issuing import Issuer
from tests.support.requests import csr

NORTH = Identity("c.local", Kind.HOSPITAL, "north")


class Authority:
    """A root, and one below it, in a folder."""

    def __init__(self, folder: Path, *, days: int = 30, ca: bool = True) -> None:
        self.root_key = ec.generate_private_key(ec.SECP256R1())
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.root = self._made("root", "root", self.root_key, self.root_key, 365, ca=True)
        self.below = self._made("below", "root", self.key, self.root_key, days, ca=ca)
        self.roots, self.chain, self.key_file = folder / "roots.pem", folder / "chain.pem", folder / "key.pem"
        self.roots.write_bytes(self.root.public_bytes(Encoding.PEM))
        self.chain.write_bytes(self.below.public_bytes(Encoding.PEM))
        write_key(self.key_file, self.key)

    def _made(
        self,
        name: str,
        issuer: str,
        key: ec.EllipticCurvePrivateKey,
        by: ec.EllipticCurvePrivateKey,
        days: int,
        *,
        ca: bool,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        usage = dict.fromkeys(
            ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement"), False
        ) | dict.fromkeys(("encipher_only", "decipher_only", "digital_signature"), False)
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=60))
            .not_valid_after(now + timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=ca, crl_sign=ca, **usage), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(by, hashes.SHA256())
        )

    def issuer(self) -> Issuer:
        return Issuer(self.chain, self.key_file, self.roots, SystemClock())


def write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)


def refused(authority: Authority) -> str:
    with pytest.raises(FedmeshError) as caught:
        authority.issuer()
    assert caught.value.code is Code.CONFIG_INVALID
    return caught.value.message


def test_an_authority_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "not the certificate of an authority" in refused(Authority(tmp_path, ca=False))
    assert "ended" in refused(Authority(tmp_path, days=-1))
    authority = Authority(tmp_path)
    authority.issuer()
    authority.key_file.chmod(0o644)
    assert "chmod 600" in refused(authority)
    write_key(authority.key_file, ec.generate_private_key(ec.SECP256R1()))
    assert "is not the key" in refused(authority)
    authority.key_file.unlink()
    assert "No such file" in refused(authority)
    foreign = Authority(tmp_path)
    foreign.roots.write_bytes((create_ca(tmp_path / "other", "c.local").folder / "ca.pem").read_bytes())
    assert "services would refuse" in refused(foreign)
    foreign.chain.write_text("junk")
    assert "not valid PEM" in refused(foreign)


def test_a_certificate_ends_before_its_authority_and_follows_a_new_one(tmp_path: Path) -> None:
    authority = Authority(tmp_path, days=1)
    issuer, now = authority.issuer(), datetime.now(UTC)
    request = read_request(csr("north"), NORTH)
    made = issuer.sign(request, NORTH, now, now + timedelta(days=7))
    assert made.not_after == authority.below.not_valid_after_utc
    fresh = Authority(tmp_path)
    os.utime(fresh.key_file, ns=(1, 1))
    again = issuer.sign(request, NORTH, now, now + timedelta(days=7))
    assert again.not_after > made.not_after
    x509.load_pem_x509_certificate(again.pem.encode()).verify_directly_issued_by(fresh.below)
    late = Issuer(fresh.chain, fresh.key_file, fresh.roots, clock := FakeClock(now))
    clock.advance(86400 * 40)
    with pytest.raises(FedmeshError, match="authority has ended"):
        late.sign(request, NORTH, now, now + timedelta(days=90))


class Audit(audit_pb2_grpc.AuditServiceServicer):
    async def GetCheckpoint(self, _request: object, _context: object) -> audit_pb2.GetCheckpointResponse:
        return audit_pb2.GetCheckpointResponse(checkpoint=str(caller()))


async def test_services_believe_a_certificate_of_an_intermediate(tmp_path: Path) -> None:
    authority, key, now = Authority(tmp_path), ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    # A server of another authority; it trusts both roots.
    server_ca = create_ca(tmp_path / "servers", "c.local")
    both = tmp_path / "both.pem"
    both.write_bytes(authority.roots.read_bytes() + (server_ca.folder / "ca.pem").read_bytes())
    served = server_ca.issue_service("audit").model_copy(update={"ca": both})
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    server = MeshServer(
        ServerConfig(listen="127.0.0.1:0", tls=served, drain_s=0),
        [Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, Audit())],
    )
    await server.start()
    signed = authority.issuer().sign(read_request(csr("north", key=key), NORTH), NORTH, now, now + timedelta(days=7))
    (tmp_path / "north.pem").write_text(signed.pem)
    write_key(tmp_path / "north.key", key)
    tls = TlsConfig(ca=both, certificate=tmp_path / "north.pem", key=tmp_path / "north.key")
    try:
        async with MeshChannel(f"127.0.0.1:{server.port}", tls) as channel:
            stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
            answer = await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest(), timeout_s=30)
    finally:
        await server.stop()
    assert answer.checkpoint == str(NORTH)
