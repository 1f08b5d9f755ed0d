"""What `fedmesh doctor` makes of certificates, clocks, files and services that are not there."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography import x509
from typer.testing import CliRunner

from services.cli.checkup import Process, check_certificate, check_network, check_settings, read_process
from services.cli.checkup_centre import check_reach
from services.cli.checkup_stores import clock_finding
from services.cli.findings import Finding, Level, as_json
from services.cli.main import app
from services.common.clock import FakeClock
from services.common.config import ClientConfig, TlsConfig
from services.common.errors import FedmeshError
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return create_ca(tmp_path / "ca", "consortium.local")


def levels(found: list[Finding]) -> dict[str, Level]:
    return {item.check: item.level for item in found}


def ends(tls: TlsConfig) -> datetime:
    return x509.load_pem_x509_certificate(tls.certificate.read_bytes()).not_valid_after_utc


def test_a_good_certificate_is_ok(ca: CertificateAuthority) -> None:
    found = check_certificate("registry", "registry", ca.issue_service("registry"))
    assert levels(found) == {"chain": Level.OK, "identity": Level.OK, "expiry": Level.OK}
    assert not any(item.todo for item in found)


def test_little_time_left_is_a_warning_and_none_a_failure(ca: CertificateAuthority) -> None:
    tls = ca.issue_service("registry")
    found = check_certificate("registry", "registry", tls, ends(tls) - timedelta(minutes=5))
    assert levels(found)["expiry"] is Level.WARN
    (over,) = check_certificate("registry", "registry", tls, ends(tls) + timedelta(minutes=5))
    assert (over.level, over.check) == (Level.FAIL, "certificate")
    assert "issue a new certificate" in over.todo


def test_another_identity_fails(ca: CertificateAuthority) -> None:
    assert levels(check_certificate("audit", "audit", ca.issue_service("registry")))["identity"] is Level.FAIL
    assert levels(check_certificate("h-1", "hospital", ca.issue_service("h-1")))["identity"] is Level.FAIL
    assert levels(check_certificate("h-1", "hospital", ca.issue_hospital("h-1")))["identity"] is Level.OK


def test_a_certificate_of_another_authority_fails(ca: CertificateAuthority, tmp_path: Path) -> None:
    other = create_ca(tmp_path / "other", "consortium.local").issue_service("registry")
    mixed = other.model_copy(update={"ca": ca.issue_service("registry").ca})
    assert levels(check_certificate("registry", "registry", mixed))["chain"] is Level.FAIL


def test_clocks() -> None:
    assert clock_finding("redis", 100.5, 100.0, 101.0).level is Level.OK
    assert clock_finding("redis", 95.0, 100.0, 101.0).level is Level.WARN
    ahead = clock_finding("redis", 150.0, 100.0, 101.0)
    assert (ahead.level, ahead.seen) == (Level.FAIL, "49.0 s from this machine's")


def test_a_service_that_is_away_fails_and_says_what_to_do(ca: CertificateAuthority) -> None:
    target = f"127.0.0.1:{free_port()}"
    (found,) = asyncio.run(check_reach("hospital-01", "registry", target, ca.issue_hospital("hospital-01")))
    assert (found.level, found.check) == (Level.FAIL, "reaches registry")
    assert target in found.seen
    assert "firewall" in found.todo


def test_without_a_usable_certificate_no_service_is_blamed(tmp_path: Path) -> None:
    past = create_ca(tmp_path / "past", "consortium.local", clock=FakeClock(datetime.now(UTC) - timedelta(days=90)))
    client = ClientConfig(target=f"127.0.0.1:{free_port()}")
    config = SimpleNamespace(registry=client, coordinator=client, aggregator=client)
    process = Process("hospital-01", "hospital", config, past.issue_hospital("hospital-01"), lambda _config: None)
    (found,) = asyncio.run(check_network(process))
    assert (found.level, found.check, found.seen) == (Level.FAIL, "reaches services", "not tried")
    (over,) = [item for item in check_settings(process) if item.check == "certificate"]
    assert (over.level, "not now: issue a new one" in over.seen) == (Level.FAIL, True)


@pytest.mark.parametrize("text", ["", "- 1\n", "redis: [\n", "a: 1\n", "server: {}\nredis: {}\n"])
def test_files_that_configure_nothing_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "some.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(FedmeshError, match=r"some\.yaml"):
        read_process(path)


def test_json_counts_every_level() -> None:
    found = [Finding(Level.OK, "a", "b", "c"), Finding(Level.FAIL, "a", "b", "c", "d")]
    told = as_json(found)
    assert told["counts"] == {"OK": 1, "WARN": 0, "FAIL": 1}
    assert told["findings"][1] == {"level": "FAIL", "part": "a", "check": "b", "seen": "c", "todo": "d"}


def test_a_folder_without_a_stack_is_an_error(tmp_path: Path) -> None:
    outcome = CliRunner().invoke(app, ["doctor", "--dir", str(tmp_path)])
    assert isinstance(outcome.exception, FedmeshError)
    assert "no stack" in str(outcome.exception)
    both = CliRunner().invoke(app, ["doctor", "--dir", str(tmp_path), "--config", "x.yaml"])
    assert "exclude each other" in str(both.exception)
