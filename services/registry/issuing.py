"""The certificate authority in the registry's hands: signs hospitals' keys under names that the registry chose."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.common.clock import Clock
from services.common.config import require_private
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.registry.domain.enrolment import Certificate, SigningRequest


@dataclass(frozen=True)
class _Authority:
    """chain: the issuing certificate, then those above it, without a root."""

    chain: Sequence[x509.Certificate]
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
    sends: str

    @property
    def issuer(self) -> x509.Certificate:
        return self.chain[0]


class Issuer:
    """Signs with the key in a file, and follows the files when they are replaced.

    certificate: PEM of the issuing authority, then of those between it and a root. roots: PEM of what services trust;
    an authority that they would not believe is refused here.
    """

    def __init__(self, certificate: Path, key: Path, roots: Path, clock: Clock) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) for files that are no usable authority."""
        self._paths = (certificate, key, roots)
        self._clock = clock
        self._stamps = self._look()
        self._authority = _load(*self._paths, clock.now())

    def sign(self, request: SigningRequest, identity: Identity, begins: datetime, ends: datetime) -> Certificate:
        """A certificate for client use, with one URI name and no other; it ends before its authority does.

        Raises: FedmeshError(CONFIG_INVALID) when the authority has ended.
        """
        authority = self._fresh()
        ends = min(ends.replace(microsecond=0), *(item.not_valid_after_utc for item in authority.chain))
        now = self._clock.now()
        if ends <= now:
            raise FedmeshError(Code.CONFIG_INVALID, "the consortium's issuing authority has ended: tell the consortium")
        signed = _build(request, identity, authority.issuer, begins, ends).sign(authority.key, hashes.SHA256())
        pem = signed.public_bytes(Encoding.PEM).decode() + authority.sends
        serial = f"{signed.serial_number:x}"
        return Certificate(identity.name, serial, request.sha256, request.key_sha256, pem, begins, ends, now)

    def _fresh(self) -> _Authority:
        stamps = self._look()
        if stamps != self._stamps:
            self._authority = _load(*self._paths, self._clock.now())
            self._stamps = stamps
        return self._authority

    def _look(self) -> list[int]:
        try:
            return [path.stat().st_mtime_ns for path in self._paths]
        except OSError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID, f"the issuing authority: {error.filename}: {error.strerror}"
            ) from error


def _load(certificate: Path, key_file: Path, roots: Path, now: datetime) -> _Authority:
    require_private(key_file, "the issuing authority's key")
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        trusted = x509.load_pem_x509_certificates(roots.read_bytes())
        key = load_pem_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        _unusable(f"cannot read {error.filename}: {error.strerror}")
    except (ValueError, TypeError):
        _unusable(f"{certificate}, {key_file} or {roots} is not valid PEM")
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        _unusable(f"{key_file} must be an ECDSA or RSA key")
    if key.public_key() != chain[0].public_key():
        _unusable(f"{key_file} is not the key of the first certificate in {certificate}")
    for item in chain:
        _require_authority(item, certificate, now)
    for item, above in pairwise(chain):
        if not _issued(item, above):
            _unusable(f"{certificate}: each certificate must be issued by the one below it in the file")
    if not any(chain[-1] == root or _issued(chain[-1], root) for root in trusted):
        _unusable(f"{certificate} does not lead to an authority in {roots}: services would refuse what it signs")
    sent = [item for item in chain if item.subject != item.issuer]
    return _Authority(chain, key, "".join(item.public_bytes(Encoding.PEM).decode() for item in sent))


def _require_authority(certificate: x509.Certificate, path: Path, now: datetime) -> None:
    try:
        basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
        usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        basic = usage = False
    if not (basic and usage):
        _unusable(f"{path} is not the certificate of an authority")
    if not certificate.not_valid_before_utc <= now < certificate.not_valid_after_utc:
        _unusable(f"{path} ended at {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, or has not begun")


def _issued(certificate: x509.Certificate, by: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(by)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _build(
    request: SigningRequest, identity: Identity, issuer: x509.Certificate, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    usage = dict.fromkeys(
        (
            "content_commitment",
            "key_encipherment",
            "data_encipherment",
            "key_agreement",
            "key_cert_sign",
            "crl_sign",
            "encipher_only",
            "decipher_only",
        ),
        False,
    )
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(identity))])
    above = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)]))
        .issuer_name(issuer.subject)
        .public_key(request.public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.KeyUsage(digital_signature=True, **usage), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(names, critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(request.public_key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(above), critical=False)
    )


def _unusable(message: str) -> NoReturn:
    raise FedmeshError(Code.CONFIG_INVALID, f"the issuing authority: {message}")
