"""A local certificate authority for development and demonstrations: short-lived ECDSA P-256 certificates.

The identity is one URI subject alternative name, `spiffe://<consortium>/service|hospital|operator/<name>`, decided by
the authority alone.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.clock import Clock, SystemClock
from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind, parse_identity
from services.common.ids import require_name
from services.embedded.accounts import private_folder
from services.embedded.processes import write_private

CA_LIFETIME: Final = timedelta(days=365)
LEAF_LIFETIME: Final = timedelta(days=30)
# Certificates start a little in the past, for peers whose clock is behind.
CLOCK_SKEW: Final = timedelta(minutes=5)
CA_CERTIFICATE: Final = "ca.pem"
CA_KEY: Final = "ca.key"

_CLIENT_ONLY: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
_SERVER_AND_CLIENT: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True)
class CertificateAuthority:
    """The authority kept in `folder`: `ca.pem`, `ca.key`, and `<name>.pem`, `<name>.key` for what it issued.

    All private keys are files of mode 0600 in a folder of mode 0700. `clock` decides the validity periods.
    """

    folder: Path
    consortium: str
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey
    clock: Clock

    def issue_service(
        self,
        name: str,
        *,
        dns: Sequence[str] = ("localhost",),
        ip: Sequence[str] = ("127.0.0.1",),
        lifetime: timedelta = LEAF_LIFETIME,
    ) -> TlsConfig:
        """Issue a service's certificate, for server and client use, also valid for the given host names and addresses.

        Raises: FedmeshError(INVALID_ARGUMENT) for a bad name or address; STORE_FULL, CONFIG_INVALID when the files
        cannot be written.
        """
        try:
            hosts: list[x509.GeneralName] = [x509.DNSName(host) for host in dns]
            hosts += [x509.IPAddress(ipaddress.ip_address(value)) for value in ip]
        except ValueError as error:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"not a host name or address: {error}") from error
        return self._issue(Kind.SERVICE, name, hosts, lifetime)

    def issue_hospital(self, hospital_id: str, *, lifetime: timedelta = LEAF_LIFETIME) -> TlsConfig:
        """Issue a hospital's certificate, for client use only. Raises as `issue_service`."""
        return self._issue(Kind.HOSPITAL, hospital_id, [], lifetime)

    def issue_operator(self, name: str, *, lifetime: timedelta = LEAF_LIFETIME) -> TlsConfig:
        """Issue an operator's certificate, for client use only. Raises as `issue_service`."""
        return self._issue(Kind.OPERATOR, name, [], lifetime)

    def _issue(self, kind: Kind, name: str, hosts: list[x509.GeneralName], lifetime: timedelta) -> TlsConfig:
        identity = self._identity(kind, name)
        stem = name if kind is Kind.SERVICE else f"{kind.value}-{name}"
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._sign(identity, key.public_key(), hosts, lifetime)
        paths = TlsConfig(
            ca=self.folder / CA_CERTIFICATE,
            certificate=self.folder / f"{stem}.pem",
            key=self.folder / f"{stem}.key",
        )
        write_private(paths.key, _key_pem(key))
        write_private(paths.certificate, _pem(certificate).decode())
        return paths

    def _identity(self, kind: Kind, name: str) -> Identity:
        return Identity(self.consortium, kind, require_name(name, f"{kind.value} name"))

    def _sign(
        self,
        identity: Identity,
        public_key: ec.EllipticCurvePublicKey,
        hosts: list[x509.GeneralName],
        lifetime: timedelta,
    ) -> x509.Certificate:
        now = self.clock.now()
        usage = _SERVER_AND_CLIENT if identity.kind is Kind.SERVICE else _CLIENT_ONLY
        names = [x509.UniformResourceIdentifier(str(identity)), *hosts]
        ending = min(now + lifetime, self.certificate.not_valid_after_utc)
        if ending <= now:
            raise FedmeshError(Code.CONFIG_INVALID, "the local certificate authority has expired: make a new one")
        builder = _builder(identity.name, self.certificate.subject, public_key, now, ending)
        return (
            builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(ca=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(
                    self.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
                ),
                critical=False,
            )
            .sign(self.key, hashes.SHA256())
        )


def create_ca(folder: Path, consortium: str, *, clock: Clock | None = None) -> CertificateAuthority:
    """Make a new authority in a folder, which is made when missing.

    Raises: FedmeshError: ALREADY_EXISTS when the folder has one, CONFIG_INVALID for a bad consortium name or folder.
    """
    clock = clock or SystemClock()
    try:
        parse_identity(f"spiffe://{consortium}/service/name")
    except FedmeshError:
        raise FedmeshError(
            Code.CONFIG_INVALID, f"consortium name {consortium!r}: use lower-case letters, digits, dots and dashes"
        ) from None
    private_folder(folder)
    if (folder / CA_KEY).exists():
        raise FedmeshError(Code.ALREADY_EXISTS, f"there is a certificate authority in {folder} already")
    key = ec.generate_private_key(ec.SECP256R1())
    now = clock.now()
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, consortium[:64]),
            x509.NameAttribute(NameOID.COMMON_NAME, "fedmesh local CA"),
        ]
    )
    certificate = (
        _builder(subject, subject, key.public_key(), now, now + CA_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(ca=True), critical=True)
        # Not used by verifiers: it lets `load_ca` know whose authority this is.
        .add_extension(
            x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://{consortium}")]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    write_private(folder / CA_CERTIFICATE, _pem(certificate).decode())
    write_private(folder / CA_KEY, _key_pem(key))
    return CertificateAuthority(folder, consortium, certificate, key, clock)


def load_ca(folder: Path, *, clock: Clock | None = None) -> CertificateAuthority:
    """Open the authority in a folder.

    Raises: FedmeshError: NOT_FOUND when there is none, CONFIG_INVALID when its files are damaged.
    """
    try:
        certificate = x509.load_pem_x509_certificate((folder / CA_CERTIFICATE).read_bytes())
        key = serialization.load_pem_private_key((folder / CA_KEY).read_bytes(), password=None)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uri = names.get_values_for_type(x509.UniformResourceIdentifier)[0]
    except FileNotFoundError:
        raise FedmeshError(Code.NOT_FOUND, f"no certificate authority in {folder}") from None
    except (ValueError, x509.ExtensionNotFound, IndexError) as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"the certificate authority in {folder} is damaged") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise FedmeshError(Code.CONFIG_INVALID, f"{folder / CA_KEY} is not the key of {folder / CA_CERTIFICATE}")
    return CertificateAuthority(folder, uri.removeprefix("spiffe://"), certificate, key, clock or SystemClock())


def _builder(
    subject: str | x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, ending: datetime
) -> x509.CertificateBuilder:
    if isinstance(subject, str):
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)])
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(ending)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
