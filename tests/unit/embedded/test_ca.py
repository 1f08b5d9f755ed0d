import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from services.common.clock import FakeClock
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.tls import load_tls
from services.embedded.ca import CertificateAuthority, create_ca, load_ca
from tests.support.certificates import expired_hospital, foreign_hospital


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return create_ca(tmp_path / "ca", "demo.example")


def certificate(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def names(cert: x509.Certificate) -> x509.SubjectAlternativeName:
    return cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def usage(cert: x509.Certificate) -> set[x509.ObjectIdentifier]:
    return set(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def test_a_service_serves_and_calls_under_its_hosts_and_its_one_identity(ca: CertificateAuthority) -> None:
    tls = ca.issue_service("registry")
    cert = certificate(tls.certificate)
    assert names(cert).get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://demo.example/service/registry"]
    assert names(cert).get_values_for_type(x509.DNSName) == ["localhost"]
    assert [str(ip) for ip in names(cert).get_values_for_type(x509.IPAddress)] == ["127.0.0.1"]
    assert usage(cert) == {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    verifier = PolicyBuilder().store(Store([ca.certificate])).build_server_verifier(x509.DNSName("localhost"))
    assert verifier.verify(cert, [])[0] == cert
    assert load_tls(tls).identity.kind is Kind.SERVICE


@pytest.mark.parametrize("kind", ["hospital", "operator"])
def test_clients_cannot_serve(ca: CertificateAuthority, kind: str) -> None:
    tls = ca.issue_hospital("north") if kind == "hospital" else ca.issue_operator("north")
    cert = certificate(tls.certificate)
    assert usage(cert) == {ExtendedKeyUsageOID.CLIENT_AUTH}
    assert names(cert).get_values_for_type(x509.DNSName) == []
    assert str(load_tls(tls).identity) == f"spiffe://demo.example/{kind}/north"
    PolicyBuilder().store(Store([ca.certificate])).build_client_verifier().verify(cert, [])


def test_a_hospital_an_operator_and_a_service_of_one_name_do_not_share_files(ca: CertificateAuthority) -> None:
    issued = [ca.issue_service("north"), ca.issue_hospital("north"), ca.issue_operator("north")]
    assert len({tls.certificate for tls in issued} | {tls.key for tls in issued}) == 6


def test_leaves_cannot_sign_and_the_authority_signs_leaves_only(ca: CertificateAuthority) -> None:
    leaf = certificate(ca.issue_hospital("north").certificate)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not leaf.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    own = ca.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value
    assert (own.ca, own.path_length) == (True, 0)
    issuer_id = leaf.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    assert issuer_id == ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest


def test_private_keys_are_for_their_owner_only(ca: CertificateAuthority) -> None:
    ca.issue_service("registry")
    keys = list(ca.folder.glob("*.key"))
    assert len(keys) == 2
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert stat.S_IMODE(ca.folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["", "North", "a/b", "..", "a" * 64, "a\n"])
def test_bad_names_are_refused(ca: CertificateAuthority, name: str) -> None:
    with pytest.raises(FedmeshError) as caught:
        ca.issue_hospital(name)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_an_authority_is_opened_again_and_never_overwritten(ca: CertificateAuthority) -> None:
    again = load_ca(ca.folder)
    assert (again.consortium, again.certificate) == (ca.consortium, ca.certificate)
    with pytest.raises(FedmeshError) as caught:
        create_ca(ca.folder, "demo.example")
    assert caught.value.code is Code.ALREADY_EXISTS


def test_missing_or_damaged_authorities_are_named(ca: CertificateAuthority, tmp_path: Path) -> None:
    with pytest.raises(FedmeshError) as caught:
        load_ca(tmp_path / "none")
    assert caught.value.code is Code.NOT_FOUND
    (ca.folder / "ca.key").write_text("junk")
    with pytest.raises(FedmeshError) as caught:
        load_ca(ca.folder)
    assert caught.value.code is Code.CONFIG_INVALID
    with pytest.raises(FedmeshError, match="consortium"):
        create_ca(tmp_path / "other", "Not A Name")


def test_lifetimes_follow_the_clock_and_end_with_the_authority(tmp_path: Path) -> None:
    clock = FakeClock(datetime(2026, 3, 1, tzinfo=UTC))
    ca = create_ca(tmp_path / "ca", "demo", clock=clock)
    cert = certificate(ca.issue_operator("ann", lifetime=timedelta(hours=8)).certificate)
    assert cert.not_valid_after_utc == datetime(2026, 3, 1, 8, tzinfo=UTC)
    clock.advance(timedelta(days=364).total_seconds())
    late = certificate(ca.issue_operator("ann").certificate)
    assert late.not_valid_after_utc == ca.certificate.not_valid_after_utc
    clock.advance(timedelta(days=2).total_seconds())
    with pytest.raises(FedmeshError, match="expired"):
        ca.issue_operator("ann")


def test_the_certificates_for_tests_are_refused(ca: CertificateAuthority, tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="not now"):
        load_tls(expired_hospital(ca, "north"))
    foreign = foreign_hospital(tmp_path / "foreign", "demo.example", "north", ca.folder / "ca.pem")
    assert load_tls(foreign).identity.name == "north"
    with pytest.raises(VerificationError):
        PolicyBuilder().store(Store([ca.certificate])).build_client_verifier().verify(
            certificate(foreign.certificate), []
        )
