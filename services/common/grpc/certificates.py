"""When certificates end, as metrics: this process's own, its authority's, and those that hospitals come with."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

from cryptography import x509
from prometheus_client import Gauge

from services.common.identity import Identity, Kind
from services.common.tls import TlsMaterial

_OWN: Final = Gauge(
    "fedmesh_certificate_not_after_seconds", "Unix time at which this process's certificate ends", ["process"]
)
_AUTHORITY: Final = Gauge(
    "fedmesh_authority_not_after_seconds", "Unix time at which the first of the trusted authorities ends", ["process"]
)
_HOSPITALS: Final = Gauge(
    "fedmesh_hospital_certificate_not_after_seconds",
    "Unix time at which the certificate ends that a hospital came with last",
    ["hospital"],
)


def note_own(material: TlsMaterial) -> None:
    """Show when this process's certificate and its authority end."""
    process = "hospital" if material.identity.kind is Kind.HOSPITAL else material.identity.name
    _OWN.labels(process).set(material.not_after.timestamp())
    authorities = x509.load_pem_x509_certificates(material.ca_pem)
    _AUTHORITY.labels(process).set(min(item.not_valid_after_utc.timestamp() for item in authorities))


def note_peer(identity: Identity, auth: Mapping[str, object]) -> None:
    """Show when the certificate of a hospital that was let in ends."""
    pem = auth.get("x509_pem_cert")
    if isinstance(pem, list | tuple) and pem:
        _HOSPITALS.labels(identity.name).set(_not_after(bytes(pem[0])))


# Read once a certificate, not once a call.
@lru_cache(maxsize=4096)
def _not_after(pem: bytes) -> float:
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc.timestamp()
