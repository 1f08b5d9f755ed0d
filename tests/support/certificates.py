"""Certificates that a server must refuse."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

from services.common.clock import FakeClock
from services.common.config import TlsConfig
from services.embedded.ca import CertificateAuthority, create_ca


def expired_hospital(ca: CertificateAuthority, hospital_id: str) -> TlsConfig:
    """A hospital's certificate of this authority that ended a day ago. Overwrites the hospital's files."""
    past = CertificateAuthority(
        ca.folder, ca.consortium, ca.certificate, ca.key, FakeClock(datetime.now(UTC) - timedelta(days=2))
    )
    return past.issue_hospital(hospital_id, lifetime=timedelta(days=1))


def foreign_hospital(folder: Path, consortium: str, hospital_id: str, trusted_ca: Path) -> TlsConfig:
    """The right name from the wrong authority; the holder itself trusts `trusted_ca`, so that it reaches the server."""
    issued = create_ca(folder, consortium).issue_hospital(hospital_id)
    return TlsConfig(ca=trusted_ca, certificate=issued.certificate, key=issued.key)
