"""Who a connection's certificate says it is, read again whenever the certificate is another one."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import read_peer
from services.embedded.ca import CertificateAuthority, create_ca

CONSORTIUM = "consortium.test"
BEGAN = datetime(2030, 1, 1, tzinfo=UTC)


def issued(folder: Path, hospital: str, at: datetime, ca: CertificateAuthority) -> bytes:
    dated = CertificateAuthority(folder, ca.consortium, ca.certificate, ca.key, FakeClock(at))
    return dated.issue_hospital(hospital).certificate.read_bytes()


def connection(hospital: str, pem: bytes) -> dict[str, list[bytes]]:
    """What gRPC says of a connection."""
    name = f"spiffe://{CONSORTIUM}/hospital/{hospital}".encode()
    return {"ssl_tls_version": [b"TLSv1.3"], "peer_spiffe_id": [name], "x509_pem_cert": [pem]}


def test_a_new_certificate_of_the_same_hospital_is_read_anew(tmp_path: Path) -> None:
    ca = create_ca(tmp_path, CONSORTIUM, clock=FakeClock(BEGAN))
    old = issued(tmp_path, "north", BEGAN, ca)
    new = issued(tmp_path, "north", BEGAN + timedelta(days=3), ca)
    first, again, renewed = (read_peer(connection("north", pem)) for pem in (old, old, new))
    assert first == again
    assert first.identity == renewed.identity
    assert renewed.certified_from - first.certified_from == timedelta(days=3)


def test_a_certificate_is_never_taken_for_another_ones(tmp_path: Path) -> None:
    ca = create_ca(tmp_path, CONSORTIUM, clock=FakeClock(BEGAN))
    north, south = (issued(tmp_path, name, BEGAN, ca) for name in ("north", "south"))
    names = [read_peer(connection(name, pem)).identity.name for name, pem in (("north", north), ("south", south))]
    assert names == ["north", "south"]
    assert read_peer(connection("north", north)).identity.name == "north"


def test_a_certificate_that_was_read_does_not_excuse_an_old_tls_or_a_second_name(tmp_path: Path) -> None:
    pem = issued(tmp_path, "north", BEGAN, create_ca(tmp_path, CONSORTIUM, clock=FakeClock(BEGAN)))
    good = connection("north", pem)
    read_peer(good)
    names = good["peer_spiffe_id"]
    changes: list[dict[str, list[bytes]]] = [
        {"ssl_tls_version": [b"TLSv1.2"]},
        {"peer_spiffe_id": [*names, names[0]]},
        {"peer_spiffe_id": []},
    ]
    for change in changes:
        for _ in range(2):
            with pytest.raises(FedmeshError) as refused:
                read_peer(good | change)
            assert refused.value.code is Code.UNAUTHENTICATED


def test_a_name_that_is_none_is_refused_each_time(tmp_path: Path) -> None:
    pem = issued(tmp_path, "north", BEGAN, create_ca(tmp_path, CONSORTIUM, clock=FakeClock(BEGAN)))
    for _ in range(2):
        with pytest.raises(FedmeshError, match="not a fedmesh identity"):
            read_peer(connection("north", pem) | {"peer_spiffe_id": [b"spiffe://consortium.test/visitor/x"]})
