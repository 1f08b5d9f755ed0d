"""Secrets of an installation without cert-manager or a store of secrets: what is missing is made, what is there stays.

For trial installations: the authority's key lies in the same namespace. A certificate is replaced when less than a
third of its time is left, its host names changed, or another authority signed it; passwords and signing keys never
change by themselves.
"""

import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature

from services.common.errors import Code, FedmeshError
from services.deployment.config import CertificateConfig, SecretsConfig
from services.embedded.ca import CA_CERTIFICATE, CA_KEY, LEAF_LIFETIME, CertificateAuthority, create_ca, load_ca
from services.embedded.processes import write_private
from services.transparency.checkpoint import generate_key, load_signing_key

TLS: Final = "kubernetes.io/tls"
BASIC_AUTH: Final = "kubernetes.io/basic-auth"
OPAQUE: Final = "Opaque"
_RENEW_BEFORE: Final = LEAF_LIFETIME / 3


class Secrets(Protocol):
    """What is needed of a cluster; see `cluster.Cluster`."""

    def secret(self, namespace: str, name: str) -> dict[str, bytes] | None: ...

    def create_secret(
        self, namespace: str, name: str, kind: str, labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> bool: ...

    def replace_secret(
        self, namespace: str, name: str, kind: str, labels: Mapping[str, str], content: Mapping[str, bytes]
    ) -> None: ...


def make_secrets(cluster: Secrets, config: SecretsConfig) -> Iterator[str]:
    """Bring all Secrets of the settings about. Yields a line for each. Safe to run twice and concurrently.

    Raises: FedmeshError(CONFIG_INVALID) for a damaged Secret; whatever the cluster raises.
    """
    store = _Store(cluster, config)
    with tempfile.TemporaryDirectory() as folder:
        if config.authority is not None:
            authority = store.authority(config.authority, Path(folder) / "ca")
            for wanted in config.certificates:
                yield store.certificate(authority, wanted)
        for account in config.passwords:
            yield store.made(account.secret, BASIC_AUTH, partial(_account, account.username))
        for service, secret in (("audit", config.audit_key), ("registry", config.registry_key)):
            if secret is not None:
                yield store.made(secret, OPAQUE, partial(_signing_key, Path(folder), config.consortium, service))


@dataclass(frozen=True)
class _Store:
    cluster: Secrets
    config: SecretsConfig

    def made(self, name: str, kind: str, make: Callable[[], Mapping[str, bytes]]) -> str:
        """Make a Secret unless it is there."""
        there = self.cluster.secret(self.config.namespace, name) is not None
        if there or not self.cluster.create_secret(self.config.namespace, name, kind, self.config.labels, make()):
            return f"{name}: kept"
        return f"{name}: made"

    def authority(self, name: str, folder: Path) -> CertificateAuthority:
        """The authority in a Secret, brought into a folder; made when missing."""
        found = self.cluster.secret(self.config.namespace, name)
        if found is None:
            made = create_ca(folder, self.config.consortium)
            content = {"ca.crt": (folder / CA_CERTIFICATE).read_bytes(), "ca.key": (folder / CA_KEY).read_bytes()}
            if self.cluster.create_secret(self.config.namespace, name, OPAQUE, self.config.labels, content):
                return made
            # Somebody else was quicker: theirs counts.
            found = self.cluster.secret(self.config.namespace, name)
        try:
            present = found or {}
            folder.mkdir(mode=0o700, exist_ok=True)
            write_private(folder / CA_CERTIFICATE, present["ca.crt"].decode())
            write_private(folder / CA_KEY, present["ca.key"].decode())
        except (KeyError, UnicodeDecodeError) as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"Secret {name} needs ca.crt and ca.key in PEM") from error
        authority = load_ca(folder)
        if authority.consortium != self.config.consortium:
            raise FedmeshError(
                Code.CONFIG_INVALID, f"Secret {name} is the authority of {authority.consortium}: delete it or rename"
            )
        return authority

    def certificate(self, authority: CertificateAuthority, wanted: CertificateConfig) -> str:
        """Issue a certificate unless there is one that will do."""
        namespace, labels = self.config.namespace, self.config.labels
        found = self.cluster.secret(namespace, wanted.secret)
        if found is not None and not _due(found, authority, wanted):
            return f"{wanted.secret}: kept"
        issued = authority.issue_service(wanted.service, dns=wanted.dns, ip=())
        content = {
            "ca.crt": issued.ca.read_bytes(),
            "tls.crt": issued.certificate.read_bytes(),
            "tls.key": issued.key.read_bytes(),
        }
        if found is None and self.cluster.create_secret(namespace, wanted.secret, TLS, labels, content):
            return f"{wanted.secret}: made"
        self.cluster.replace_secret(namespace, wanted.secret, TLS, labels, content)
        return f"{wanted.secret}: renewed"


def _due(found: Mapping[str, bytes], authority: CertificateAuthority, wanted: CertificateConfig) -> bool:
    try:
        certificate = x509.load_pem_x509_certificate(found["tls.crt"])
        certificate.verify_directly_issued_by(authority.certificate)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (KeyError, ValueError, TypeError, InvalidSignature, x509.ExtensionNotFound):
        return True
    left = certificate.not_valid_after_utc - datetime.now(UTC)
    hosts = set(names.get_values_for_type(x509.DNSName))
    identity = f"spiffe://{authority.consortium}/service/{wanted.service}"
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    return left < _RENEW_BEFORE or hosts != set(wanted.dns) or uris != [identity] or "tls.key" not in found


def _account(username: str) -> dict[str, bytes]:
    return {"username": username.encode(), "password": secrets.token_urlsafe(32).encode()}


def _signing_key(folder: Path, consortium: str, service: str) -> dict[str, bytes]:
    path = folder / f"{service}.key"
    generate_key(path, f"{consortium}/{service}")
    return {path.name: path.read_bytes(), f"{service}.vkey": f"{load_signing_key(path).verifier}\n".encode()}
