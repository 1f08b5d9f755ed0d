"""Every call that a real server refuses for who makes it is told, with the person where one is known."""

import ssl
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc

from services.common.config import ServerConfig, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.grpc.server import Endpoint, MeshServer
from services.common.refusal_book import Refusal
from services.common.standing import Member, Standing, StandingConfig
from services.embedded.ca import create_ca
from tests.integration.common.test_people import people_config
from tests.support.old_tls import over_tls12
from tests.support.signing_in import TestIssuer, running_issuer


class Registry(registry_pb2_grpc.RegistryServiceServicer):
    """Answers everybody, but for plans; its downloads go on until their reader is refused."""

    async def ListHospitals(self, request: Any, context: Any) -> Any:
        return registry_pb2.ListHospitalsResponse()

    async def GetPlan(self, request: Any, context: Any) -> Any:
        raise FedmeshError(Code.PERMISSION_DENIED, "a use case refuses")

    async def GetJob(self, request: Any, context: Any) -> Any:
        raise FedmeshError(Code.NOT_FOUND, "no such job")

    async def DownloadBlob(self, request: Any, context: Any) -> AsyncIterator[Any]:
        while True:
            yield registry_pb2.DownloadBlobResponse(chunk=b"x")


@dataclass
class Setup:
    issuer: TestIssuer
    folder: Path
    members: list[Member] = field(default_factory=lambda: [Member("north")])
    refused: list[Refusal] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ca = create_ca(self.folder / "ca", "test.local")
        self.standing = Standing(self._read, StandingConfig())
        config = ServerConfig(
            listen="127.0.0.1:0", tls=self.ca.issue_service("registry"), people=people_config(self.issuer), drain_s=0
        )
        descriptor = registry_pb2.DESCRIPTOR.services_by_name["RegistryService"]
        add = registry_pb2_grpc.add_RegistryServiceServicer_to_server
        self.server = MeshServer(
            config, [Endpoint(descriptor, add, Registry())], admit=self.standing.admit, refused=self._note
        )

    async def _note(self, refusal: Refusal) -> None:
        self.refused.append(refusal)

    async def _read(self) -> list[Member]:
        return self.members

    async def bar(self, member: Member) -> None:
        self.members = [member]
        await self.standing.refresh()

    def channel(self, tls: TlsConfig, token: str | None = None) -> MeshChannel:
        return MeshChannel(f"127.0.0.1:{self.server.port}", tls, bearer=lambda: token)

    async def ask(self, tls: TlsConfig, method: str, token: str | None = None) -> tuple[str, str, str]:
        """The one refusal that a call must make: caller, code, reason."""
        del self.refused[:]
        async with self.channel(tls, token) as channel:
            stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
            with pytest.raises(FedmeshError):
                await call(getattr(stub, method), getattr(registry_pb2, f"{method}Request")())
        # On a busy machine a client asks a second time.
        (found,) = set(self.refused)
        assert found.method == f"RegistryService/{method}"
        who = found.caller
        return (f"{who.kind.value}/{who.name}" if who else "", found.code.value, found.reason)


@pytest.fixture(scope="module")
def issuer() -> Iterator[TestIssuer]:
    with running_issuer() as made:
        yield made


@pytest.fixture
async def setup(issuer: TestIssuer, tmp_path: Path) -> AsyncIterator[Setup]:
    made = Setup(issuer, tmp_path)
    await made.standing.refresh()
    await made.server.start()
    yield made
    await made.server.stop()


async def test_people_who_are_refused_are_told_by_name_once_it_is_known(setup: Setup) -> None:
    desk, issuer = setup.ca.issue_operator("desk"), setup.issuer
    expired = issuer.token(exp=int(datetime.now(UTC).timestamp()) - 60)
    denied = "permission-denied"
    cases = (
        ("ListHospitals", None, "operator/desk", "unauthenticated", "fedmesh login"),
        ("ListHospitals", expired, "operator/desk", "unauthenticated", "it has expired"),
        ("ListHospitals", "a.b.c", "operator/desk", "unauthenticated", "not a signed"),
        ("RegisterHospital", issuer.token(sub="rita", roles=["readers"]), "operator/rita", denied, "roles"),
        ("RegisterHospital", issuer.token(sub="ann", amr=["pwd"]), "operator/ann", denied, "second factor"),
        ("GetPlan", issuer.token(sub="ann"), "operator/ann", denied, "a use case refuses"),
    )
    for method, token, who, code, reason in cases:
        caller, found, told = await setup.ask(desk, method, token)
        assert (caller, found) == (who, code)
        assert reason in told
        assert token is None or not any(part in told for part in token.split(".") if len(part) > 2)


async def test_hospitals_and_services_that_are_refused_are_told(setup: Setup) -> None:
    north = setup.ca.issue_hospital("north")
    assert (await setup.ask(north, "RegisterHospital"))[:2] == ("hospital/north", "permission-denied")
    aggregator = await setup.ask(setup.ca.issue_service("aggregator"), "CreateJob")
    assert aggregator == ("service/aggregator", "permission-denied", "service aggregator may not call CreateJob")
    await setup.bar(Member("north", certificates_from=datetime.now(UTC) + timedelta(seconds=60)))
    assert "is revoked" in (await setup.ask(north, "GetJob"))[2]
    await setup.bar(Member("north", "suspended"))
    assert "is suspended" in (await setup.ask(north, "GetJob"))[2]


async def test_a_stream_that_ends_by_a_suspension_is_told_and_other_errors_are_not(setup: Setup) -> None:
    async with setup.channel(setup.ca.issue_hospital("north")) as channel:
        stub = channel.stub(registry_pb2_grpc.RegistryServiceStub)
        with pytest.raises(FedmeshError, match="no such job"):
            await call(stub.GetJob, registry_pb2.GetJobRequest())
        assert setup.refused == []
        parts = stream(stub.DownloadBlob, registry_pb2.DownloadBlobRequest(), timeout_s=30)
        await anext(parts)
        await setup.bar(Member("north", "suspended"))
        with pytest.raises(FedmeshError, match="suspended"):
            _ = [part async for part in parts]
    (found,) = set(setup.refused)
    assert (found.method, found.caller and found.caller.name) == ("RegistryService/DownloadBlob", "north")


async def test_a_caller_that_cannot_be_named_is_told_as_such(setup: Setup) -> None:
    tls = setup.ca.issue_hospital("north")
    context = ssl.create_default_context(cafile=str(tls.ca))
    context.load_cert_chain(tls.certificate, tls.key)
    await over_tls12(context, setup.server.port, "/fedmesh.registry.v1.RegistryService/GetJob")
    (found,) = setup.refused
    assert (found.caller, found.reason) == (None, "TLS 1.3 is required")
