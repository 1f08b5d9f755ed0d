"""Mutual TLS: credentials that follow the files on disk, and early, clear errors about bad certificates."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import grpc
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, parse_identity


@dataclass(frozen=True)
class TlsMaterial:
    """Certificate files as read at one moment."""

    ca_pem: bytes
    certificate_pem: bytes
    key_pem: bytes
    identity: Identity
    not_after: datetime


def load_tls(config: TlsConfig, now: datetime | None = None) -> TlsMaterial:
    """Read and check the certificate files.

    Raises: FedmeshError(CONFIG_INVALID) for unreadable files, an expired certificate, a key that does not belong to it,
        or a certificate without exactly one fedmesh identity.
    """
    pems = []
    for path in (config.ca, config.certificate, config.key):
        try:
            pems.append(path.read_bytes())
        except OSError as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"cannot read {path}: {error.strerror}") from error
    try:
        certificate = x509.load_pem_x509_certificate(pems[1])
        key = load_pem_private_key(pems[2], password=None)
        x509.load_pem_x509_certificates(pems[0])
    except ValueError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{config.certificate}, its key or its CA is not valid PEM") from error
    if key.public_key() != certificate.public_key():
        raise FedmeshError(Code.CONFIG_INVALID, f"{config.key} is not the key of {config.certificate}")
    at = now or datetime.now(UTC)
    if not certificate.not_valid_before_utc <= at <= certificate.not_valid_after_utc:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"{config.certificate} is valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, not now: issue a new one",
        )
    return TlsMaterial(pems[0], pems[1], pems[2], certificate_identity(certificate), certificate.not_valid_after_utc)


def certificate_identity(certificate: x509.Certificate) -> Identity:
    """The one fedmesh identity of a certificate.

    Raises: FedmeshError(CONFIG_INVALID) when there is none or more than one URI name.
    """
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    if len(uris) != 1:
        raise FedmeshError(Code.CONFIG_INVALID, "a fedmesh certificate has exactly one URI name (spiffe://...)")
    return parse_identity(uris[0])


def server_credentials(config: TlsConfig, *, ask_clients: bool = True) -> grpc.ServerCredentials:
    """Server credentials that demand a client certificate and pick up renewed files at the next handshake.

    ask_clients: False for the one listener whose callers have no certificate yet.

    Raises: FedmeshError(CONFIG_INVALID) as `load_tls`, at start only; later unreadable files keep the old certificate.
    """
    load_tls(config)
    return grpc.dynamic_ssl_server_credentials(
        _configuration(config),
        _reloader(config),  # type: ignore[arg-type]  # None means unchanged; the stubs do not know
        require_client_authentication=ask_clients,
    )


def _configuration(config: TlsConfig) -> grpc.ServerCertificateConfiguration:
    material = load_tls(config)
    return grpc.ssl_server_certificate_configuration(
        [(material.key_pem, material.certificate_pem)], root_certificates=material.ca_pem
    )


def _reloader(config: TlsConfig) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    seen = [file_stamps(config)]

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        try:
            stamps = file_stamps(config)
            if stamps == seen[0]:
                return None
            fresh = _configuration(config)
        except (OSError, FedmeshError):
            # Half-written files in the middle of a renewal: keep the old certificate, try again at the next handshake.
            return None
        seen[0] = stamps
        return fresh

    return fetch


def file_stamps(config: TlsConfig) -> list[int]:
    """When the certificate files were last changed; they are other files when this changes. Raises: OSError."""
    return [path.stat().st_mtime_ns for path in (config.ca, config.certificate, config.key)]


def channel_credentials(config: TlsConfig) -> grpc.ChannelCredentials:
    """Client credentials of this process.

    Raises: FedmeshError(CONFIG_INVALID) as `load_tls`.
    """
    material = load_tls(config)
    return grpc.ssl_channel_credentials(material.ca_pem, material.key_pem, material.certificate_pem)
