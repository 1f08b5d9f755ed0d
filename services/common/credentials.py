"""A hospital's certificate and key on its own disk: made there, replaced as one, never half.

`current` is a link to the folder of the present pair, and moves by one rename; so that whoever reads through it finds a
certificate with its own key, before and after every crash. What is asked for but not yet answered waits in a folder
beside it: asked again, it is the same request, and gets the same answer. Enrolment and renewal have one each, for a
person may enrol anew while the node renews.
"""

import os
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.tls import certificate_identity

_CURRENT: Final = "current"
_SERIAL: Final = re.compile(r"[0-9a-f]{1,40}")
ENROLMENT: Final = "enrolment"
RENEWAL: Final = "renewal"
_CERTIFICATE: Final = "certificate.pem"
_KEY: Final = "key.pem"
_REQUEST: Final = "request.der"
_CA: Final = "ca.pem"


class CredentialFolder:
    """The folder of one hospital's credentials, mode 0700. purpose: whose request waits, `enrolment` or `renewal`."""

    def __init__(self, folder: Path, purpose: str = RENEWAL) -> None:
        self.folder = folder.absolute()
        self._pending = self.folder / purpose

    @property
    def tls(self) -> TlsConfig:
        """Where the present certificate, its key and the authority are."""
        current = self.folder / _CURRENT
        return TlsConfig(ca=self.folder / _CA, certificate=current / _CERTIFICATE, key=current / _KEY)

    def trust(self, ca_pem: bytes) -> None:
        """Make the folder, and keep the authority's certificates in it.

        Raises: FedmeshError(CONFIG_INVALID) when they are none, or the folder cannot be written.
        """
        try:
            x509.load_pem_x509_certificates(ca_pem)
        except ValueError as error:
            raise FedmeshError(
                Code.CONFIG_INVALID, "the authority's file has no certificate in PEM: ask the consortium for ca.pem"
            ) from error
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.folder.chmod(0o700)
            _replace(self.folder / _CA, ca_pem)
        except OSError as error:
            raise self._unwritable(error) from error

    def request(self, hospital_id: str) -> bytes:
        """The signing request (DER) that is to be answered; with a new key unless one waits already.

        Raises: FedmeshError(CONFIG_INVALID) when the folder cannot be written.
        """
        pending = self._pending
        try:
            if (pending / _REQUEST).exists():
                return (pending / _REQUEST).read_bytes()
            shutil.rmtree(pending, ignore_errors=True)
            pending.mkdir(mode=0o700)
            key = ec.generate_private_key(ec.SECP256R1())
            name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hospital_id)])
            made = x509.CertificateSigningRequestBuilder().subject_name(name).sign(key, hashes.SHA256())
            _replace(pending / _KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            der = made.public_bytes(Encoding.DER)
            _replace(pending / _REQUEST, der)
        except OSError as error:
            raise self._unwritable(error) from error
        return der

    def forget_request(self) -> None:
        """Begin with a new key next time."""
        shutil.rmtree(self._pending, ignore_errors=True)

    def install(self, certificate_pem: bytes, hospital_id: str) -> x509.Certificate:
        """Make the answer to the request the present certificate.

        Raises: FedmeshError(INVALID_ARGUMENT) when it is not of this hospital or not for the key that waits,
            (CONFIG_INVALID) when the folder cannot be written.
        """
        pending = self._pending
        try:
            certificate = x509.load_pem_x509_certificates(certificate_pem)[0]
            key = load_pem_private_key((pending / _KEY).read_bytes(), password=None)
            identity = certificate_identity(certificate)
        except (OSError, ValueError, FedmeshError) as error:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, "the registry's answer is no certificate to our request"
            ) from error
        if key.public_key() != certificate.public_key() or (identity.kind, identity.name) != (
            Kind.HOSPITAL,
            hospital_id,
        ):
            raise FedmeshError(
                Code.INVALID_ARGUMENT, f"the registry's answer is a certificate of {identity}, or of another key"
            )
        try:
            self._switch(pending, certificate_pem, f"{certificate.serial_number:x}")
        except OSError as error:
            raise self._unwritable(error) from error
        return certificate

    def present(self) -> tuple[datetime, datetime]:
        """(since when it is here, when it ends) of the present certificate.

        Raises: FedmeshError(CONFIG_INVALID) when there is none.
        """
        path = self.tls.certificate
        try:
            since = datetime.fromtimestamp(path.stat().st_mtime, UTC)
            return since, x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
        except (OSError, ValueError) as error:
            raise FedmeshError(
                Code.CONFIG_INVALID, f"there is no certificate in {self.folder}: run `fedmesh hospital enrol`"
            ) from error

    def _switch(self, pending: Path, certificate_pem: bytes, name: str) -> None:
        fresh = self.folder / name
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(mode=0o700)
        # The key stays beside the request too until the switch is done: a crash before it asks and installs once more.
        _replace(fresh / _KEY, (pending / _KEY).read_bytes())
        _replace(fresh / _CERTIFICATE, certificate_pem)
        link = self.folder / f".{_CURRENT}.new"
        link.unlink(missing_ok=True)
        link.symlink_to(name)
        link.replace(self.folder / _CURRENT)
        _sync(self.folder)
        self.forget_request()
        for old in self.folder.iterdir():
            if _SERIAL.fullmatch(old.name) and old != fresh:
                shutil.rmtree(old, ignore_errors=True)

    def _unwritable(self, error: OSError) -> FedmeshError:
        return FedmeshError(Code.CONFIG_INVALID, f"cannot write {error.filename or self.folder}: {error.strerror}")


def _replace(path: Path, content: bytes) -> None:
    """Write a file of mode 0600 that is whole or not there, and on the disk when this returns."""
    staging = path.with_name(f".{path.name}.new")
    staging.unlink(missing_ok=True)
    with open(os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
