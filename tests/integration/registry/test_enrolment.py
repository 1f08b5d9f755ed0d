"""Enrolment over real TLS and PostgreSQL: what a token buys, what is refused, and what the audit log is told."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fedmesh.registry.v1 import enrolment_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.cli.tokens import Token
from services.common.credentials import CredentialFolder
from services.common.errors import Code
from services.common.grpc.client import call
from services.common.ids import new_id
from services.common.tls import load_tls
from tests.integration.registry.enrolling import Enrolling
from tests.integration.registry.harness import Registry, code, refused
from tests.support.old_tls import over_tls12
from tests.support.requests import csr


@pytest.fixture
async def enrolment(registry: Registry, tmp_path: Path) -> AsyncIterator[Enrolling]:
    await registry.register("north", "south")
    made = Enrolling(registry, tmp_path)
    yield made
    await made.close()


async def test_a_token_buys_one_certificate_under_the_registrys_name(enrolment: Enrolling) -> None:
    token = await enrolment.invite("north")
    request = csr("north")
    answers = await asyncio.gather(*(enrolment.enrol(token, request) for _ in range(3)))
    assert len(set(answers)) == 1, "a request that is repeated gets the answer of before"
    (certificate,) = x509.load_pem_x509_certificates(answers[0])
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert list(names) == [x509.UniformResourceIdentifier("spiffe://consortium.test/hospital/north")]
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    life = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert life == timedelta(days=7, minutes=5), "it begins in the past, for clocks that are behind"
    assert enrolment.registry.sql("select count(*) from registry.certificates") == [(1,)]
    stored = str(enrolment.registry.sql("select * from registry.invitations, registry.requests"))
    assert token.sha256 in stored
    assert token.text not in stored
    again = await refused(enrolment.enrol(token, csr("north")))
    assert (again.code, "tell the consortium" in again.message) == (Code.PERMISSION_DENIED, True)
    told = enrolment.told("hospital.invited", "hospital.enrolled", "enrolment.refused")
    assert [kind for kind, _, _ in told] == ["hospital.invited", "hospital.enrolled", "enrolment.refused"]
    assert {subject for _, subject, _ in told} == {"hospital/north"}
    await enrolment.registry.drained()
    listed = await call(enrolment.registry.operator().ListHospitals, registry_pb2.ListHospitalsRequest())
    ends = listed.hospitals[0].certificate_not_after.ToDatetime()
    assert ends == certificate.not_valid_after_utc.replace(tzinfo=None)
    assert not listed.hospitals[1].HasField("certificate_not_after")


async def test_what_is_refused_leaves_the_token_good_and_a_line_in_the_log(enrolment: Enrolling) -> None:
    token = await enrolment.invite("north")
    key = ec.generate_private_key(ec.SECP256R1())
    good = csr("north", key=key)
    bad = {
        csr("south"): Code.PERMISSION_DENIED,
        csr("north", names=[x509.DNSName("registry")]): Code.PERMISSION_DENIED,
        good[:-1] + bytes([good[-1] ^ 1]): Code.INVALID_ARGUMENT,
        b"": Code.INVALID_ARGUMENT,
        good + bytes(9000): Code.TOO_LARGE,
    }
    for request, expected in bad.items():
        assert await code(enrolment.enrol(token, request)) is expected
    stranger = Token.generate("south")
    assert await code(enrolment.enrol(stranger, csr("south"))) is Code.PERMISSION_DENIED
    # Too large for the listener: it is not even read.
    assert await code(enrolment.enrol(token, bytes(20_000))) is Code.TOO_LARGE
    told = enrolment.told("enrolment.refused")
    assert [body["code"] for _, _, body in told] == [item.value for item in (*bad.values(), Code.PERMISSION_DENIED)]
    assert [subject for _, subject, _ in told] == ["hospital/north"] * len(bad) + ["enrolment/unknown"]
    other = await enrolment.invite("south")
    assert await code(enrolment.enrol(other, good)) is Code.PERMISSION_DENIED, "a token is for its own hospital"
    await enrolment.enrol(token, good)
    assert await code(enrolment.enrol(other, csr("south", key=key))) is Code.WRONG_STATE, "a key is certified once"


async def test_old_withdrawn_and_suspended_invitations(enrolment: Enrolling) -> None:
    first = await enrolment.invite("north")
    second = await enrolment.invite("north")
    assert "withdrawn" in (await refused(enrolment.enrol(first, csr("north")))).message
    enrolment.registry.sql(
        "update registry.invitations set issued_at = issued_at - interval '2 day', expires_at = now() - interval '1 s'"
    )
    assert "ended" in (await refused(enrolment.enrol(second, csr("north")))).message
    third = await enrolment.invite("north")
    await enrolment.registry.suspend("north")
    assert "suspended" in (await refused(enrolment.enrol(third, csr("north")))).message
    assert await code(enrolment.invite("north")) is Code.WRONG_STATE
    assert await code(enrolment.invite("nobody")) is Code.NOT_FOUND
    assert await code(enrolment.invite("south", valid_s=59)) is Code.INVALID_ARGUMENT
    await enrolment.registry.decide("reinstate", "north")
    await enrolment.enrol(third, csr("north"))


async def test_renewal_needs_a_new_key_and_a_hospital_in_good_standing(enrolment: Enrolling) -> None:
    folder = await enrolment.enrolled("north")
    first = load_tls(folder.tls).not_after
    assert await code(enrolment.renew(folder, csr("north"))) is Code.RATE_LIMITED
    enrolment.age("north")
    assert await code(enrolment.renew(folder, csr("south"))) is Code.PERMISSION_DENIED
    request = folder.request("north")
    answers = {await enrolment.renew(folder, request) for _ in range(2)}
    assert len(answers) == 1, "a lost answer is given again"
    folder.install(answers.pop(), "north")
    assert load_tls(folder.tls).not_after >= first
    enrolment.age("north")
    again = csr("north", key=_key(folder))
    assert await code(enrolment.renew(folder, again)) is Code.WRONG_STATE, "the key is certified already"
    await enrolment.registry.suspend("north")
    assert await code(enrolment.renew(folder, csr("north"))) is Code.PERMISSION_DENIED
    assert len(enrolment.told("certificate.renewed")) == 1
    refusals = [body["code"] for _, _, body in enrolment.told("call.refused")]
    assert refusals == ["permission-denied", "wrong-state", "permission-denied"]


async def test_what_a_hospital_had_before_is_refused(enrolment: Enrolling) -> None:
    old = await enrolment.enrolled("north", "old")
    assert await code(enrolment.asks(old)) is Code.RATE_LIMITED
    new = await enrolment.enrolled("north", "new")

    async def refuses(folder: CredentialFolder) -> bool:
        return "revoked" in (await refused(enrolment.asks(folder))).message

    await enrolment.registry.settled(lambda: refuses(old))
    assert await code(enrolment.asks(new)) is Code.RATE_LIMITED
    request = pb.RevokeCertificatesRequest(request_id=new_id(), hospital_id="north", reason="stolen laptop")
    await call((await enrolment.credentials()).RevokeCertificates, request)
    await enrolment.registry.settled(lambda: refuses(new))
    newest = await enrolment.enrolled("north", "newest")
    await enrolment.registry.settled(lambda: _admitted(enrolment, newest))
    assert len(enrolment.told("certificates.revoked")) == 1


async def test_the_door_is_for_tls_1_3_and_enrolment_only(enrolment: Enrolling) -> None:
    async with grpc.aio.secure_channel(enrolment.address, grpc.ssl_channel_credentials(enrolment.ca)) as channel:
        for method in ("/fedmesh.registry.v1.RegistryService/ListHospitals", "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(method)(b"", timeout=10)  # type: ignore[arg-type]
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    context = ssl.create_default_context(cadata=enrolment.ca.decode())
    method = "/fedmesh.registry.v1.EnrolmentService/Enrol"
    received = await over_tls12(context, enrolment.registry.door.port, method)
    assert b"TLS 1.3 is required" in received or b"TLS%201.3" in received
    assert enrolment.registry.sql("select 1 from registry.outbox where type = 'enrolment.refused'") == []


async def _admitted(enrolment: Enrolling, folder: CredentialFolder) -> bool:
    return await code(enrolment.asks(folder)) is Code.RATE_LIMITED


def _key(folder: CredentialFolder) -> Any:
    return load_pem_private_key(folder.tls.key.read_bytes(), None)
