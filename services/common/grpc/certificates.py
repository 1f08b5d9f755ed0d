"""From when to when certificates are valid, as metrics: of this process, its authority and hospitals."""

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
_OWN_FROM: Final = Gauge(
    "fedmesh_certificate_not_before_seconds", "Unix time at which this process's certificate began", ["process"]
)
_AUTHORITY: Final = Gauge(
    "fedmesh_authority_not_after_seconds", "Unix time at which the first of the trusted authorities ends", ["process"]
)
_HOSPITALS: Final = Gauge(
    "fedmesh_hospital_certificate_not_after_seconds",
    "Unix time at which the certificate ends that a hospital came with last",
    ["hospital"],
)
_HOSPITALS_FROM: Final = Gauge(
    "fedmesh_hospital_certificate_not_before_seconds",
    "Unix time at which the certificate began that a hospital came with last",
    ["hospital"],
)


def note_own(material: TlsMaterial) -> None:
    """Show from when to when this process's certificate is valid, and when its authority ends."""
    process = "hospital" if material.identity.kind is Kind.HOSPITAL else material.identity.name
    since, until = _validity(material.certificate_pem)
    _OWN_FROM.labels(process).set(since)
    _OWN.labels(process).set(until)
    authorities = x509.load_pem_x509_certificates(material.ca_pem)
    _AUTHORITY.labels(process).set(min(item.not_valid_after_utc.timestamp() for item in authorities))


def note_peer(identity: Identity, auth: Mapping[str, object]) -> None:
    """Show from when to when the certificate of a hospital that was let in is valid."""
    pem = auth.get("x509_pem_cert")
    if isinstance(pem, list | tuple) and pem:
        since, until = _validity(bytes(pem[0]))
        _HOSPITALS_FROM.labels(identity.name).set(since)
        _HOSPITALS.labels(identity.name).set(until)


# Read once a certificate, not once a call.
@lru_cache(maxsize=4096)
def _validity(pem: bytes) -> tuple[float, float]:
    certificate = x509.load_pem_x509_certificate(pem)
    return certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
