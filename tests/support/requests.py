"""Certificate signing requests, good and bad."""

from collections.abc import Sequence
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

P256 = ec.SECP256R1()


def csr(
    name: str = "",
    *,
    key: Any = None,
    names: Sequence[x509.GeneralName] = (),
    algorithm: Any = hashes.SHA256(),  # noqa: B008 - immutable
) -> bytes:
    """A PKCS #10 request in DER, with a P-256 key of its own unless one is given."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)] if name else [])
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(key or ec.generate_private_key(P256), algorithm).public_bytes(Encoding.DER)
