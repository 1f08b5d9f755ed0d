"""The server builder and the client over real mutual TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from prometheus_client import REGISTRY

from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.grpc.gate import caller
from services.common.grpc.server import LIVE, Endpoint, MeshServer
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port
from tests.support.certificates import expired_hospital, foreign_hospital
from tests.support.old_tls import over_tls12
from tests.support.slow_network import slow_network

CHECKPOINT = "/fedmesh.audit.v1.AuditService/GetCheckpoint"


class Audit(audit_pb2_grpc.AuditServiceServicer):
    """Answers as told by the test."""

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.failures = 0
        self.entered = asyncio.Event()
        self.hold: asyncio.Event | None = None
        self.leaf = b""
        self.sent = 0

    async def GetCheckpoint(self, _request: Any, _context: Any) -> Any:
        self.entered.set()
        if self.hold is not None:
            await self.hold.wait()
        if self.failures > 0:
            self.failures -= 1
            raise FedmeshError(Code.STORE_UNAVAILABLE, "away")
        if self.error is not None:
            raise self.error
        return audit_pb2.GetCheckpointResponse(checkpoint=str(caller()))

    async def ListEntries(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        for index in range(request.limit):
            yield audit_pb2.ListEntriesResponse(index=index, leaf=self.leaf)
            self.sent += 1
        if self.hold is not None:
            await self.hold.wait()
        raise FedmeshError(Code.NOT_FOUND, "no more")


class Setup:
    def __init__(self, ca: CertificateAuthority, folder: Path) -> None:
        self.ca, self.folder, self.audit = ca, folder, Audit()
        self.config = ServerConfig(
            listen=f"127.0.0.1:{free_port()}",
            health_listen=f"127.0.0.1:{free_port()}",
            tls=ca.issue_service("audit"),
            drain_s=5,
        )
        descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
        self.server = MeshServer(
            self.config, [Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, self.audit)]
        )

    async def ask(self, tls: TlsConfig, *, target: str = "", **options: Any) -> Any:
        async with MeshChannel(target or self.config.listen, tls) as channel:
            stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
            return await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest(), **options)


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(create_ca(tmp_path / "ca", "test.local"), tmp_path)
    await made.server.start()
    yield made
    if made.audit.hold is not None:
        made.audit.hold.set()
    await made.server.stop()


async def test_the_caller_is_who_the_certificate_says(setup: Setup) -> None:
    answer = await setup.ask(setup.ca.issue_hospital("h-1"))
    assert answer.checkpoint == "spiffe://test.local/hospital/h-1"


async def test_a_long_line_is_no_hindrance(setup: Setup) -> None:
    """Setting up a connection takes several round trips; it is not given up before they can be over."""
    async with slow_network(setup.config.listen, 0.25) as target:
        answer = await setup.ask(setup.ca.issue_hospital("h-1"), target=target, timeout_s=60)
    assert answer.checkpoint == "spiffe://test.local/hospital/h-1"


async def test_no_client_certificate_no_connection(setup: Setup) -> None:
    credentials = grpc.ssl_channel_credentials(setup.config.tls.ca.read_bytes())
    async with grpc.aio.secure_channel(setup.config.listen, credentials) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await audit_pb2_grpc.AuditServiceStub(channel).GetCheckpoint(audit_pb2.GetCheckpointRequest(), timeout=5)  # type: ignore[misc]
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert not setup.audit.entered.is_set()


async def test_a_foreign_certificate_gets_no_connection(setup: Setup) -> None:
    tls = foreign_hospital(setup.folder / "other", "test.local", "h-1", setup.config.tls.ca)
    with pytest.raises(FedmeshError) as caught:
        await setup.ask(tls, timeout_s=3)
    assert caught.value.code in (Code.SERVICE_UNAVAILABLE, Code.DEADLINE_EXCEEDED)
    assert not setup.audit.entered.is_set()


async def test_an_expired_certificate_is_named_before_it_is_used(setup: Setup) -> None:
    with pytest.raises(FedmeshError, match="not now: issue a new one") as caught:
        await setup.ask(expired_hospital(setup.ca, "h-1"))
    assert caught.value.code is Code.CONFIG_INVALID


async def test_an_expired_certificate_is_refused_by_the_server_too(setup: Setup) -> None:
    tls = expired_hospital(setup.ca, "h-1")
    credentials = grpc.ssl_channel_credentials(tls.ca.read_bytes(), tls.key.read_bytes(), tls.certificate.read_bytes())
    async with grpc.aio.secure_channel(setup.config.listen, credentials) as channel:
        with pytest.raises(grpc.aio.AioRpcError):
            await audit_pb2_grpc.AuditServiceStub(channel).GetCheckpoint(audit_pb2.GetCheckpointRequest(), timeout=5)  # type: ignore[misc]
    assert not setup.audit.entered.is_set()


async def test_a_client_below_tls_1_3_is_refused(setup: Setup) -> None:
    tls = setup.ca.issue_hospital("h-1")
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    received = await over_tls12(context, int(setup.config.listen.rsplit(":", 1)[1]), CHECKPOINT)
    assert b"TLS 1.3 is required" in received or b"TLS%201.3" in received
    assert not setup.audit.entered.is_set()


async def test_a_hospital_cannot_call_what_is_for_others(setup: Setup) -> None:
    async with MeshChannel(setup.config.listen, setup.ca.issue_hospital("h-1")) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        with pytest.raises(FedmeshError, match="hospital h-1 may not call AppendEvents") as caught:
            await call(stub.AppendEvents, audit_pb2.AppendEventsRequest())
    assert caught.value.code is Code.PERMISSION_DENIED


async def test_a_call_without_a_deadline_is_refused(setup: Setup) -> None:
    async with MeshChannel(setup.config.listen, setup.ca.issue_hospital("h-1")) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        with pytest.raises(grpc.aio.AioRpcError, match="no deadline"):
            await stub.GetCheckpoint(audit_pb2.GetCheckpointRequest())  # type: ignore[misc]


async def test_an_unknown_error_shows_nothing_of_the_inside(setup: Setup) -> None:
    setup.audit.error = RuntimeError("password=hunter2")
    with pytest.raises(FedmeshError) as caught:
        await setup.ask(setup.ca.issue_hospital("h-1"))
    assert caught.value.code is Code.INTERNAL
    assert "hunter2" not in caught.value.message


async def test_patience_outlasts_a_store_that_comes_back(setup: Setup) -> None:
    tls = setup.ca.issue_hospital("h-1")
    setup.audit.failures = 1000  # more than a call without patience is made again
    with pytest.raises(FedmeshError) as caught:
        await setup.ask(tls)
    assert caught.value.retryable
    assert setup.audit.failures > 0
    setup.audit.failures = 5
    assert (await setup.ask(tls, patience_s=30)).checkpoint.endswith("h-1")


async def test_a_stream_waits_for_its_reader(setup: Setup) -> None:
    """What a slow reader has not read yet stays unmade, or a server would hold all of it for each of them."""
    setup.audit.leaf = bytes(256 << 10)
    async with MeshChannel(setup.config.listen, setup.ca.issue_operator("o-1")) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        entries = stream(stub.ListEntries, audit_pb2.ListEntriesRequest(limit=100), timeout_s=60)
        for read in range(1, 41):
            assert (await anext(entries)).index == read - 1
            await asyncio.sleep(0.01)  # A fast server would use it to send more.
            assert setup.audit.sent - read < 8
        await entries.aclose()  # type: ignore[attr-defined]


async def test_a_stream_ends_with_its_error(setup: Setup) -> None:
    async with MeshChannel(setup.config.listen, setup.ca.issue_operator("o-1")) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        entries = stream(stub.ListEntries, audit_pb2.ListEntriesRequest(limit=3), timeout_s=5)
        assert [(await anext(entries)).index for _ in range(3)] == [0, 1, 2]
        with pytest.raises(FedmeshError, match="no more"):
            await anext(entries)


async def test_health_is_told_in_plaintext_and_nothing_else_is(setup: Setup) -> None:
    async with grpc.aio.insecure_channel(str(setup.config.health_listen)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await audit_pb2_grpc.AuditServiceStub(channel).GetCheckpoint(audit_pb2.GetCheckpointRequest(), timeout=5)  # type: ignore[misc]
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_server_that_is_not_ready_says_that_it_lives(setup: Setup) -> None:
    """A restart would bring no store back: the probe for liveness asks another name than the one for readiness."""
    await setup.server.set_serving(False)
    async with grpc.aio.insecure_channel(str(setup.config.health_listen)) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        answers = {
            name: (await health.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)).status
            for name in ("", "fedmesh.audit.v1.AuditService", LIVE)
        }
    serving, not_serving = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
    assert answers == {"": not_serving, "fedmesh.audit.v1.AuditService": not_serving, LIVE: serving}


async def test_calls_that_meet_a_server_which_stops_can_be_made_again(setup: Setup) -> None:
    """gRPC cancels those that it has received and not begun yet."""
    channels = [MeshChannel(setup.config.listen, setup.ca.issue_hospital("h-1")) for _ in range(4)]

    async def ask(channel: MeshChannel) -> FedmeshError:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)
        while True:
            try:
                await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest())
            except FedmeshError as error:
                return error

    asking = [asyncio.create_task(ask(channel)) for channel in channels for _ in range(25)]
    await setup.audit.entered.wait()
    await asyncio.sleep(0.5)
    await setup.server.stop()
    errors = await asyncio.gather(*asking)
    for channel in channels:
        await channel.close()
    assert {error.code for error in errors} == {Code.SERVICE_UNAVAILABLE}


async def test_draining_lets_the_call_in_flight_finish(setup: Setup) -> None:
    setup.audit.hold = asyncio.Event()
    call_in_flight = asyncio.create_task(setup.ask(setup.ca.issue_hospital("h-1")))
    await setup.audit.entered.wait()
    stopping = asyncio.create_task(setup.server.stop())
    await asyncio.sleep(0.2)
    setup.audit.hold.set()
    assert (await call_in_flight).checkpoint.endswith("h-1")
    await stopping


async def test_a_renewed_certificate_serves_the_next_connection(setup: Setup) -> None:
    tls = setup.ca.issue_hospital("h-1")
    before = setup.config.tls.certificate.read_bytes()
    setup.ca.issue_service("audit")
    assert setup.config.tls.certificate.read_bytes() != before
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    host, port = setup.config.listen.rsplit(":", 1)
    _reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname="localhost")
    served = ssl.DER_cert_to_PEM_cert(writer.get_extra_info("ssl_object").getpeercert(binary_form=True))
    writer.close()
    assert served.split() == setup.config.tls.certificate.read_text().split()


async def test_calls_on_a_connection_that_is_left_are_made_again_and_streams_end_as_in_an_outage(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stream's reader connects anew; it must not take it for its own cancellation."""
    monkeypatch.setattr("services.common.grpc.client._LOOK_S", 0.0)
    monkeypatch.setattr("services.common.grpc.client._LEAVE_S", 0.1)
    setup.audit.hold = asyncio.Event()
    tls = setup.ca.issue_operator("olga")
    async with MeshChannel(setup.config.listen, tls) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)

        def ask() -> asyncio.Task[Any]:
            return asyncio.create_task(call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest(), timeout_s=60))

        unary, entries = ask(), stream(stub.ListEntries, audit_pb2.ListEntriesRequest(limit=1))
        assert (await anext(entries)).index == 0
        await setup.audit.entered.wait()
        setup.ca.issue_operator("olga")
        setup.audit.entered.clear()
        third = ask()
        await setup.audit.entered.wait()
        setup.audit.entered.clear()
        with pytest.raises(FedmeshError) as caught:
            await asyncio.wait_for(anext(entries), 30)
        assert caught.value.code is Code.SERVICE_UNAVAILABLE
        # One's own cancellation stays one.
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
        await asyncio.wait_for(setup.audit.entered.wait(), 30)
        setup.audit.hold.set()
        assert (await asyncio.wait_for(unary, 30)).checkpoint.endswith("olga")


async def test_a_client_follows_its_renewed_certificate(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service runs for longer than its certificate lasts. Here the new one bears another name, to be told apart."""
    monkeypatch.setattr("services.common.grpc.client._LOOK_S", 0.0)
    tls, other = setup.ca.issue_hospital("h-1"), setup.ca.issue_hospital("h-2")
    async with MeshChannel(setup.config.listen, tls) as channel:
        stub = channel.stub(audit_pb2_grpc.AuditServiceStub)

        async def ask() -> str:
            return str((await call(stub.GetCheckpoint, audit_pb2.GetCheckpointRequest())).checkpoint)

        assert await ask() == "spiffe://test.local/hospital/h-1"
        setup.audit.hold = asyncio.Event()
        setup.audit.entered.clear()
        under_way = asyncio.create_task(ask())
        await setup.audit.entered.wait()
        tls.key.write_bytes(other.key.read_bytes())
        held, setup.audit.hold = setup.audit.hold, None
        # The key is there, its certificate not yet: as in the middle of a renewal.
        assert await ask() == "spiffe://test.local/hospital/h-1"
        tls.certificate.write_bytes(other.certificate.read_bytes())
        assert await ask() == "spiffe://test.local/hospital/h-2"
        held.set()
        assert await under_way == "spiffe://test.local/hospital/h-1"


async def test_a_taken_port_is_a_clear_error(setup: Setup) -> None:
    second = Setup.__new__(Setup)
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    second.server = MeshServer(
        setup.config, [Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, Audit())]
    )
    with pytest.raises(FedmeshError, match="port taken"):
        await second.server.start()


async def test_calls_are_counted_by_outcome(setup: Setup) -> None:
    labels = {"method": CHECKPOINT, "code": "UNAVAILABLE", "objective": "yes"}
    before = REGISTRY.get_sample_value("fedmesh_grpc_server_handled_total", labels) or 0.0
    setup.audit.failures = 10
    with pytest.raises(FedmeshError):
        await setup.ask(setup.ca.issue_hospital("h-1"))
    # gRPC's own retries of UNAVAILABLE are calls too.
    assert (REGISTRY.get_sample_value("fedmesh_grpc_server_handled_total", labels) or 0.0) >= before + 1


class Refusing(registry_pb2_grpc.RegistryServiceServicer):
    """Refuses every upload at its first message."""

    async def UploadBlob(self, request_iterator: Any, _context: Any) -> Any:
        await anext(aiter(request_iterator))
        raise FedmeshError(Code.WRONG_STATE, "not now")


async def test_a_refusal_in_the_middle_of_an_upload_arrives_as_it_was_meant(tmp_path: Path) -> None:
    ca = create_ca(tmp_path / "ca", "test.local")
    config = ServerConfig(
        listen=f"127.0.0.1:{free_port()}", health_listen=f"127.0.0.1:{free_port()}", tls=ca.issue_service("registry")
    )
    descriptor = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
    server = MeshServer(
        config, [Endpoint(descriptor, registry_pb2_grpc.add_RegistryServiceServicer_to_server, Refusing())]
    )
    await server.start()
    codes: set[Code] = set()

    async def upload(stub: Any, pause_s: float) -> None:
        async def messages() -> AsyncIterator[Any]:
            for _ in range(4):
                yield registry_pb2.UploadBlobRequest(chunk=bytes(60_000))
                await asyncio.sleep(pause_s)

        with pytest.raises(FedmeshError) as caught:
            await call(stub.UploadBlob, messages)
        codes.add(caught.value.code)

    try:
        async with MeshChannel(config.listen, ca.issue_hospital("hospital-01")) as channel:
            stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
            # Without care about one in sixteen is reported as INTERNAL.
            for step in range(40):
                await asyncio.gather(*(upload(stub, step % 20 * 0.0002) for _ in range(8)))
    finally:
        await server.stop()
    assert codes == {Code.WRONG_STATE}
