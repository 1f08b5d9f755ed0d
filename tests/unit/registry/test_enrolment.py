"""What the registry takes of a signing request, and when a token and a renewal count."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.registry.domain.enrolment import (
    Certificate,
    Invitation,
    beginning,
    read_request,
    require_due,
    require_usable,
    revocation,
)
from tests.support.requests import csr

AT = datetime(2026, 1, 1, tzinfo=UTC)
NORTH = Identity("c.local", Kind.HOSPITAL, "north")
SKEW = timedelta(minutes=5)


def refusal(der: bytes) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        read_request(der, NORTH)
    return caught.value


def test_a_request_may_name_its_hospital_or_nobody() -> None:
    own = [x509.UniformResourceIdentifier(str(NORTH))]
    for der in (csr(), csr("north"), csr("north", names=own)):
        assert read_request(der, NORTH).key_sha256


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("south", []),
        ("north", [x509.UniformResourceIdentifier("spiffe://c.local/hospital/south")]),
        ("north", [x509.UniformResourceIdentifier("spiffe://c.local/operator/north")]),
        ("north", [x509.UniformResourceIdentifier("spiffe://other.local/hospital/north")]),
        ("north", [x509.DNSName("registry")]),
        ("north", [x509.UniformResourceIdentifier(str(NORTH)), x509.DNSName("registry")]),
    ],
)
def test_a_request_for_another_name_is_refused(name: str, names: list[x509.GeneralName]) -> None:
    assert refusal(csr(name, names=names)).code is Code.PERMISSION_DENIED


def test_weak_and_unusable_keys_are_refused() -> None:
    weak = [
        rsa.generate_private_key(65537, 2048),
        rsa.generate_private_key(3, 3072),
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
    ]
    for key in weak:
        assert refusal(csr("north", key=key)).code is Code.INVALID_ARGUMENT
    edwards = refusal(csr("north", key=ed25519.Ed25519PrivateKey.generate(), algorithm=None))
    assert "Ed25519" in edwards.message
    assert read_request(csr("north", key=rsa.generate_private_key(65537, 3072)), NORTH).public_key is not None


def test_a_request_must_be_signed_by_its_key() -> None:
    good = csr("north")
    # The signature is what comes last.
    assert refusal(good[:-1] + bytes([good[-1] ^ 1])).code is Code.INVALID_ARGUMENT
    assert refusal(csr("north", algorithm=hashes.SHA224())).code is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("junk", [b"", b"\0", b"junk" * 100, b"\x30\x82\xff\xff" + b"\0" * 100])
def test_malformed_requests_are_refused(junk: bytes) -> None:
    assert refusal(junk).code is Code.INVALID_ARGUMENT
    good = csr("north")
    assert refusal(good + junk).code is Code.INVALID_ARGUMENT if junk else True


def test_a_huge_request_is_not_parsed() -> None:
    assert refusal(csr("north") + bytes(9000)).code is Code.TOO_LARGE


def invitation(**changes: Any) -> Invitation:
    return Invitation("a" * 64, "north", "op", AT, AT + timedelta(hours=1), **changes)


@pytest.mark.parametrize(
    ("found", "says"),
    [
        (None, "not known"),
        (invitation(used_at=AT), "used"),
        (invitation(withdrawn_at=AT), "withdrawn"),
        (Invitation("a" * 64, "north", "op", AT - timedelta(days=1), AT), "ended"),
    ],
)
def test_tokens_that_do_not_count(found: Invitation | None, says: str) -> None:
    with pytest.raises(FedmeshError, match=says) as caught:
        require_usable(found, AT)
    assert caught.value.code is Code.PERMISSION_DENIED
    assert require_usable(invitation(), AT + timedelta(minutes=59)).hospital_id == "north"


def certificate(begins: datetime, issued: datetime) -> Certificate:
    return Certificate("north", "1", "", "", "", begins, issued + timedelta(days=7), issued)


def test_certificates_begin_in_the_past_and_one_after_the_other() -> None:
    assert beginning(AT, SKEW, None, None) == AT - SKEW
    newest = certificate(AT - SKEW, AT)
    assert beginning(AT, SKEW, newest, None) == AT - SKEW + timedelta(seconds=1)
    assert beginning(AT + timedelta(days=1), SKEW, newest, None) == AT + timedelta(days=1) - SKEW
    # What exists at a revocation begins before it, what comes after does not.
    since = revocation(AT)
    assert newest.not_before < since <= beginning(AT, SKEW, newest, since)


def test_a_fresh_certificate_is_not_renewed() -> None:
    require_due(None, AT)
    newest = certificate(AT - SKEW, AT)
    with pytest.raises(FedmeshError) as caught:
        require_due(newest, AT + timedelta(hours=1))
    assert caught.value.code is Code.RATE_LIMITED
    require_due(newest, AT + timedelta(days=1))
