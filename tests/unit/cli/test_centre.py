"""Which centre a command talks to, and what is said when that is not clear or its file is wrong."""

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from typer.testing import CliRunner

from services.cli import centre as places
from services.cli import membership, people, session
from services.cli.centre import RemoteCentre, find_place, load_centre
from services.cli.checkup import check_certificate
from services.cli.checkup_centre import check_reach
from services.cli.findings import Level
from services.cli.main import app
from services.cli.mesh import ask
from services.common.clock import FakeClock
from services.common.config import ServerConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.grpc.server import Endpoint, MeshServer
from services.common.people.device import Client, Tokens
from services.embedded.ca import CertificateAuthority, create_ca
from services.embedded.processes import free_port
from services.embedded.stack import SERVICES
from tests.support.reached import centre_file

NAME = "fedmesh-audit.mesh.svc.cluster.local"
Write = Callable[..., Path]


@pytest.fixture
def ca(tmp_path: Path) -> CertificateAuthority:
    return create_ca(tmp_path / "ca", "consortium.local")


@pytest.fixture
def write(tmp_path: Path, ca: CertificateAuthority, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Writes the file of a centre, in an empty folder without anything that names another one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(places.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    operator = ca.issue_operator("olga")

    def made(name: str = "centre.yaml", target: str = "", **more: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        targets = {service: {"target": target or f"{service}.example:443"} for service in SERVICES}
        return centre_file(path, targets, more.pop("tls", operator), **more)

    return made


def of(place: Any) -> Path:
    assert isinstance(place, RemoteCentre)
    return place.file


def why(code: Code, ask_for: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(FedmeshError) as caught:
        ask_for(*arguments, **options)
    assert caught.value.code is code
    return caught.value.message


def stack_in(folder: Path) -> Path:
    for name in ("ca", "config"):
        (folder / name).mkdir(parents=True)
    return folder


def test_the_option_comes_before_the_variable_before_what_is_found(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Path("up")
    assert find_place(None, None, default) == default
    usual = write("config/fedmesh/centre.yaml")
    assert of(find_place(None, None, default)) == usual
    named = write("named.yaml")
    monkeypatch.setenv(places.VARIABLE, str(named))
    stack_in(tmp_path / "up")
    assert of(find_place(None, None, default)) == named
    other = write("other.yaml")
    assert of(find_place(None, other, default)) == other
    assert find_place(Path("mine"), None, default) == Path("mine")


def test_two_centres_are_never_guessed_between(write: Write, tmp_path: Path) -> None:
    usual = write("config/fedmesh/centre.yaml")
    assert "exclude each other" in why(Code.INVALID_ARGUMENT, find_place, Path("up"), usual, Path("up"))
    stack_in(tmp_path / "up")
    said = why(Code.INVALID_ARGUMENT, find_place, None, None, Path("up"))
    assert str(usual) in said
    assert "there is a stack in up" in said


def test_neither_is_said_with_what_to_do(write: Write) -> None:
    for command in (["members", "changes"], ["hospitals"], ["status"], ["rounds", "watch"], ["doctor"]):
        said = str(CliRunner().invoke(app, command).exception)
        assert "there is no stack in" in said, command
        assert "--centre" in said, command


def test_options_of_a_group_are_not_overlooked(write: Write) -> None:
    for command in (["models", "--centre", str(write()), "aliases"], ["rounds", "--dir", "up", "watch"]):
        assert "after" in str(CliRunner().invoke(app, command).exception)
    assert "exclude" in str(CliRunner().invoke(app, ["doctor", "--config", "a", "--centre", "b"]).exception)


def test_paths_are_relative_to_the_file(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write()
    settings = yaml.safe_load(path.read_text())
    settings["operator"] = {
        name: str(Path(value).relative_to(tmp_path)) for name, value in settings["operator"].items()
    }
    (tmp_path / "audit.vkey").touch()
    path.write_text(yaml.safe_dump({**settings, "log_key": "audit.vkey"}))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    centre = load_centre(Path("../centre.yaml"))
    assert centre.operator().certificate.exists()
    assert centre.audit_verifier.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"registri": {}}, "registri: Extra inputs"),
        ({"registry": {"target": "https://registry.example"}}, "registry.target"),
        ({"registry": {"target": "registry.example"}}, "registry.target"),
        ({"audit": None}, "audit"),
        ({"audit": {"target": "a:1", "server_name": ""}}, "audit.server_name"),
        ({"log_key": "none.vkey"}, "log_key: there is no file"),
        ({"roster": "none.json"}, "roster: there is no file"),
        ({"sign_in": {"issuer": "https://idp.example"}}, "sign_in.client_id"),
        ({"enrolment": "somewhere"}, "enrolment"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(write: Write, change: dict[str, Any], words: str) -> None:
    path = write()
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    said = why(Code.CONFIG_INVALID, load_centre, path)
    assert str(path) in said
    assert words in said


def test_a_file_that_cannot_be_read(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "cannot read none.yaml" in why(Code.CONFIG_INVALID, load_centre, Path("none.yaml"))
    monkeypatch.setenv(places.VARIABLE, "none.yaml")
    assert "FEDMESH_CENTRE: cannot read" in why(Code.CONFIG_INVALID, find_place, None, None, Path("up"))
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "not valid YAML" in why(Code.CONFIG_INVALID, load_centre, tmp_path / "bad.yaml")


def test_certificates_that_are_no_use(write: Write, ca: CertificateAuthority, tmp_path: Path) -> None:
    past = CertificateAuthority(
        tmp_path / "ca", ca.consortium, ca.certificate, ca.key, FakeClock(datetime.now(UTC) - timedelta(days=2))
    )
    expired = past.issue_operator("old", lifetime=timedelta(days=1))
    said = why(Code.CONFIG_INVALID, ask, load_centre(write(tls=expired)), "registry", _list_hospitals)
    assert "operator-old.pem is valid from" in said
    assert "issue a new one" in said
    (over,) = check_certificate("operator", "operator", expired)
    assert over.level is Level.FAIL
    hospital = ca.issue_hospital("h-1")
    said = why(Code.CONFIG_INVALID, ask, load_centre(write(tls=hospital)), "registry", _list_hospitals)
    assert "hospital/h-1, which is no operator" in said
    assert any(item.level is Level.FAIL for item in check_certificate("operator", "operator", hospital))
    olga = ca.issue_operator("olga")
    assert all(item.level is Level.OK for item in check_certificate("operator", "operator", olga))
    olga.key.chmod(0o644)
    assert "open to other users" in why(Code.CONFIG_INVALID, load_centre, write())


def test_another_operator_has_another_file(write: Write) -> None:
    said = why(Code.INVALID_ARGUMENT, membership.changes, None, "second-operator", write())
    assert "another operator has another file" in said


def test_a_service_that_is_away_is_named_with_what_to_do(write: Write) -> None:
    target = f"127.0.0.1:{free_port()}"
    path = write(target=target)
    said = why(Code.SERVICE_UNAVAILABLE, ask, load_centre(path), "registry", _list_hospitals)
    assert target in said
    assert f"fedmesh doctor --centre {path}" in said
    shown = CliRunner().invoke(app, ["status", "--centre", str(path)])
    assert shown.exit_code == 3
    assert "not serving" in shown.output


async def _list_hospitals(registry: Any) -> Any:
    from fedmesh.registry.v1 import registry_pb2

    return await call(registry.ListHospitals, registry_pb2.ListHospitalsRequest())


class _Audit(audit_pb2_grpc.AuditServiceServicer):
    async def GetCheckpoint(self, _request: Any, _context: Any) -> Any:
        return audit_pb2.GetCheckpointResponse(checkpoint="here")


def test_the_name_in_a_certificate_is_verified_and_can_be_told(write: Write, ca: CertificateAuthority) -> None:
    """As through a tunnel: the address is this machine's, the certificate is for a name of the cluster."""
    config = ServerConfig(listen="127.0.0.1:0", tls=ca.issue_service("audit", dns=[NAME], ip=[]), drain_s=0)
    descriptor = audit_pb2.DESCRIPTOR.services_by_name["AuditService"]
    endpoint = Endpoint(descriptor, audit_pb2_grpc.add_AuditServiceServicer_to_server, _Audit())

    async def run() -> None:
        server = MeshServer(config, [endpoint])
        await server.start()
        try:
            target = f"127.0.0.1:{server.port}"
            for name, expected in ((NAME, ""), (None, target), ("fedmesh-registry", target)):
                change = {"audit": {"target": target} | ({"server_name": name} if name else {})}
                centre = load_centre(write(f"{name}.yaml", **change))
                assert expected in await asyncio.to_thread(_checkpoint_or_why, centre)
                (found,) = await check_reach("operator", "audit", target, centre.operator(), name)
                assert (found.level is Level.OK) == (name == NAME)
        finally:
            await server.stop()

    asyncio.run(run())


def _checkpoint_or_why(centre: RemoteCentre) -> str:
    async def read(audit: Any) -> str:
        return str((await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest())).checkpoint)

    try:
        found = ask(centre, "audit", read)
    except FedmeshError as error:
        return error.message
    assert found == "here"
    return ""


def test_a_token_is_for_its_own_centre_alone(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = {"issuer": "https://idp.example", "client_id": "fedmesh-cli", "ca": "idp.pem"}
    centre = load_centre(write(sign_in=ours))
    assert centre.bearer() is None
    session.save(Client(ours["issuer"], "fedmesh-cli", "openid", "access"), Tokens("ours", time.time() + 600, None))
    assert centre.bearer() == "ours"
    assert load_centre(write("open.yaml")).bearer() == "ours"
    session.save(Client("https://other.example", "x", "openid", "access"), Tokens("theirs", time.time() + 600, None))
    assert centre.bearer() is None
    assert centre.client() == Client(ours["issuer"], "fedmesh-cli", "openid offline_access", "access", _beside(centre))
    assert people._client_of_centre(centre.file) == centre.client()
    monkeypatch.setenv(places.VARIABLE, str(centre.file))
    assert people._client_of_centre(None) == centre.client()
    monkeypatch.setenv(places.VARIABLE, str(write("open.yaml")))
    assert people._client_of_centre(None) is None, "the session before counts"
    assert "sign_in" in why(Code.CONFIG_INVALID, people._client_of_centre, write("open.yaml"))


def _beside(centre: RemoteCentre) -> Path:
    return centre.file.parent / "idp.pem"
