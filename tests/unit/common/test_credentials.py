"""A hospital's folder of credentials: replaced as one, asked for once."""

import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from services.common.clock import SystemClock
from services.common.credentials import ENROLMENT, CredentialFolder
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.common.tls import load_tls
from services.embedded.ca import CertificateAuthority, create_ca
from services.registry.domain.enrolment import beginning, read_request
from services.registry.issuing import Issuer
from tests.support.requests import csr

NORTH = Identity("c.local", Kind.HOSPITAL, "north")


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return create_ca(tmp_path / "ca", "c.local")


def issued(ca: CertificateAuthority, der: bytes, identity: Identity = NORTH) -> bytes:
    issuer = Issuer(ca.folder / "ca.pem", ca.folder / "ca.key", ca.folder / "ca.pem", SystemClock())
    now = SystemClock().now()
    made = issuer.sign(
        read_request(der, identity), identity, beginning(now, timedelta(minutes=5), None, None), now + timedelta(days=7)
    )
    return made.pem.encode()


def folder(ca: CertificateAuthority, path: Path) -> CredentialFolder:
    made = CredentialFolder(path, ENROLMENT)
    made.trust((ca.folder / "ca.pem").read_bytes())
    return made


def test_a_request_stays_the_same_until_it_is_answered(ca: CertificateAuthority, tmp_path: Path) -> None:
    north = folder(ca, tmp_path / "north")
    der = north.request("north")
    assert CredentialFolder(tmp_path / "north", ENROLMENT).request("north") == der, "after a crash too"
    # The node's own request is another one.
    assert CredentialFolder(tmp_path / "north").request("north") != der
    north.install(issued(ca, der), "north")
    assert load_tls(north.tls).identity == NORTH
    assert north.request("north") != der
    modes = {path.stat().st_mode & 0o77 for path in north.folder.rglob("*")} | {north.folder.stat().st_mode & 0o77}
    assert modes == {0}


def test_a_crash_before_the_switch_leaves_what_was_there(
    ca: CertificateAuthority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    north = folder(ca, tmp_path / "north")
    north.install(issued(ca, north.request("north")), "north")
    before = north.tls.certificate.resolve()
    answer = issued(ca, north.request("north"))
    with monkeypatch.context() as broken:
        broken.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError(28, "no space left")))
        with pytest.raises(FedmeshError, match="no space left"):
            north.install(answer, "north")
    load_tls(north.tls)
    assert north.tls.certificate.resolve() == before
    north.install(answer, "north")
    load_tls(north.tls)
    assert north.tls.certificate.resolve() != before
    assert not before.exists(), "old keys do not stay"


def test_an_answer_to_something_else_is_not_installed(ca: CertificateAuthority, tmp_path: Path) -> None:
    north, other = folder(ca, tmp_path / "north"), folder(ca, tmp_path / "other")
    der = north.request("north")
    for answer in (b"junk", b"", issued(ca, other.request("north")), issued(ca, csr("north"))):
        with pytest.raises(FedmeshError) as caught:
            north.install(answer, "north")
        assert caught.value.code is Code.INVALID_ARGUMENT
    assert not (north.folder / "current").exists()
    north.install(issued(ca, der), "north")
    shutil.rmtree(north.folder)
    with pytest.raises(FedmeshError, match="fedmesh hospital enrol"):
        north.present()
