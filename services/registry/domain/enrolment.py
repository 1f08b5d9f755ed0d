"""Invitations and certificate signing requests: what is accepted, and why not. Every name comes from the registry."""

import hashlib
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, NoReturn

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import NameOID

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity

MAX_CSR_BYTES: Final = 8192
MAX_TOKEN_CHARACTERS: Final = 256
MIN_VALID: Final = timedelta(minutes=1)
MAX_VALID: Final = timedelta(days=30)

_RSA_BITS: Final = range(3072, 4097)
_RSA_EXPONENT: Final = 65537
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey


@dataclass(frozen=True)
class Invitation:
    """Somebody who has the token may enrol as this hospital, once. serial: of the certificate that it became."""

    token_sha256: str
    hospital_id: str
    issued_by: str
    issued_at: datetime
    expires_at: datetime
    withdrawn_at: datetime | None = None
    used_at: datetime | None = None
    serial: str | None = None


@dataclass(frozen=True)
class Certificate:
    """A certificate that was issued. pem: with its intermediates. serial: lower-case hex."""

    hospital_id: str
    serial: str
    csr_sha256: str
    key_sha256: str
    pem: str
    not_before: datetime
    not_after: datetime
    issued_at: datetime


@dataclass(frozen=True)
class SigningRequest:
    """A request whose sender holds its key. sha256: of its DER. key_sha256: of the SubjectPublicKeyInfo."""

    sha256: str
    public_key: PublicKey
    key_sha256: str


def token_digest(token: str) -> str:
    """SHA-256 of a token, hex."""
    return hashlib.sha256(token.encode()).hexdigest()


def csr_digest(der: bytes) -> str:
    """SHA-256 of a signing request, hex."""
    return hashlib.sha256(der).hexdigest()


def require_usable(invitation: Invitation | None, now: datetime) -> Invitation:
    """Raises: FedmeshError(PERMISSION_DENIED) for a token that is unknown, expired, used or withdrawn."""
    if invitation is None:
        _refuse("the token is not known here: check that it is complete, or ask the consortium for a new one")
    if invitation.used_at is not None:
        _refuse(
            f"the token was used at {invitation.used_at:%Y-%m-%d %H:%M} UTC with another key: if that was not you, tell"
            " the consortium at once; else ask for a new one"
        )
    if invitation.withdrawn_at is not None:
        _refuse("the token was withdrawn: use the newest that the consortium gave you")
    if now >= invitation.expires_at:
        _refuse(f"the token ended at {invitation.expires_at:%Y-%m-%d %H:%M} UTC: ask the consortium for a new one")
    return invitation


def read_request(der: bytes, identity: Identity) -> SigningRequest:
    """The key of a PKCS #10 request, once it is fit, its sender holds it, and nobody else is named beside it.

    The names of the certificate never come from here; a request that asks for others is refused, so that its sender
    does not believe that it got them.

    Raises: FedmeshError(INVALID_ARGUMENT) for anything that is not in order, (TOO_LARGE),
        (PERMISSION_DENIED) for another's name.
    """
    if len(der) > MAX_CSR_BYTES:
        raise FedmeshError(Code.TOO_LARGE, f"a signing request has at most {MAX_CSR_BYTES} bytes")
    try:
        request = x509.load_der_x509_csr(der)
        key = _require_fit(request.public_key())
        if not isinstance(request.signature_hash_algorithm, _HASHES) or not request.is_signature_valid:
            _wrong("the signing request is not signed by its own key with SHA-256 or better")
        _require_own_names(request, identity)
    except (ValueError, TypeError, UnsupportedAlgorithm, x509.DuplicateExtension) as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, "not a certificate signing request (PKCS #10, DER)") from error
    spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return SigningRequest(csr_digest(der), key, hashlib.sha256(spki).hexdigest())


def _require_fit(key: object) -> PublicKey:
    """Before the signature is looked at: a huge modulus or exponent would cost whoever verifies it."""
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1):
        return key
    if isinstance(key, rsa.RSAPublicKey):
        if key.key_size not in _RSA_BITS or key.public_numbers().e != _RSA_EXPONENT:
            _wrong(f"an RSA key has {_RSA_BITS.start} to {_RSA_BITS.stop - 1} bits and the exponent {_RSA_EXPONENT}")
        return key
    if isinstance(key, ed25519.Ed25519PublicKey):
        _wrong("gRPC's TLS takes no Ed25519 certificates: use ECDSA P-256")
    raise FedmeshError(Code.INVALID_ARGUMENT, "the key must be ECDSA P-256, or RSA of at least 3072 bits")


def _require_own_names(request: x509.CertificateSigningRequest, identity: Identity) -> None:
    named = [(attribute.oid, str(attribute.value)) for attribute in request.subject]
    if named not in ([], [(NameOID.COMMON_NAME, identity.name)]):
        _foreign(identity)
    for extension in request.extensions:
        if not isinstance(extension.value, x509.SubjectAlternativeName):
            _wrong(f"leave out the extension {extension.oid.dotted_string}: the consortium decides what a key is for")
        if list(extension.value) != [x509.UniformResourceIdentifier(str(identity))]:
            _foreign(identity)


def beginning(now: datetime, backdate: timedelta, newest: Certificate | None, since: datetime | None) -> datetime:
    """When the next certificate of a hospital begins: a little in the past, for clocks that are behind.

    Later than the newest one begins, in whole seconds as certificates have them: then a moment tells the two apart.
    since: certificates that begin before it are revoked.
    """
    begins = (now - backdate).replace(microsecond=0)
    if newest is not None:
        begins = max(begins, newest.not_before + timedelta(seconds=1))
    return begins if since is None else max(begins, since)


def revocation(now: datetime) -> datetime:
    """From when on certificates count, if all that exist now are revoked, whoever issued them."""
    return now.replace(microsecond=0) + timedelta(seconds=1)


def require_due(newest: Certificate | None, now: datetime) -> None:
    """A hospital that renews all the time would fill the registry.

    Raises: FedmeshError(RATE_LIMITED) within a tenth of the newest certificate's time.
    """
    if newest is None:
        return
    again = newest.issued_at + (newest.not_after - newest.issued_at) / 10
    if now < again:
        raise FedmeshError(Code.RATE_LIMITED, f"a certificate was issued just now: renew it after {again:%H:%M:%S} UTC")


def require_valid_for(valid: timedelta) -> None:
    """Raises: FedmeshError(INVALID_ARGUMENT) for a token's time out of range."""
    if not MIN_VALID <= valid <= MAX_VALID:
        raise FedmeshError(Code.INVALID_ARGUMENT, "a token is valid for one minute to 30 days", field="valid_s")


def _refuse(message: str) -> NoReturn:
    raise FedmeshError(Code.PERMISSION_DENIED, message)


def _wrong(message: str) -> NoReturn:
    raise FedmeshError(Code.INVALID_ARGUMENT, message)


def _foreign(identity: Identity) -> NoReturn:
    raise FedmeshError(
        Code.PERMISSION_DENIED,
        f"the signing request names somebody else than {identity}: leave all names out, or name {identity.name} only",
    )
