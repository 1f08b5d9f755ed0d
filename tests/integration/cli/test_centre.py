"""Every command that asks services, at a centre of separate replicas that a file names."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer
import yaml
from fedmesh.registry.v1 import registry_pb2
from typer.testing import CliRunner, Result

from services.cli import centre as places
from services.cli.main import app
from services.cli.mesh import stub
from services.common.grpc.client import call
from services.common.ids import new_id
from services.embedded.stack import CONSORTIUM
from services.plans.library import shipped_plan
from services.plans.manifest import canonical_bytes
from services.secure_sum.roster import MemberKeys, found, save_roster_file, sign_roster
from tests.support.reached import Reached, centre_file, reached_centre

pytestmark = pytest.mark.timeout(400)
HOSPITALS: Final = [f"h{number}" for number in range(1, 5)]
# A version that nobody made: what asks for one is told so by the registry.
NO_VERSION: Final = "5d7ce7a0-0000-4000-8000-000000000001/1"


class Operators:
    """Runs commands as ann, who is named by the environment, or as bob, by an option; keeps what was run."""

    def __init__(self, ann: Path, bob: Path) -> None:
        self.ann, self.bob = ann, bob
        self.ran: set[str] = set()

    def run(self, *arguments: str) -> Result:
        words = [word for word in arguments[:2] if re.fullmatch(r"[a-z]+", word)]
        self.ran |= {" ".join(words[:1]), " ".join(words)}
        return CliRunner().invoke(app, list(arguments))

    def __call__(self, *arguments: str) -> str:
        """What a command printed that ends well."""
        result = self.run(*arguments)
        assert result.exit_code == 0, f"{arguments}: {result.output} {result.exception}"
        return result.output

    def refused(self, *arguments: str) -> str:
        """Why a command was refused."""
        result = self.run(*arguments)
        assert result.exit_code == 1, f"{arguments}: {result.output}"
        return str(result.exception)


@pytest.fixture
def reached(tmp_path: Path) -> Iterator[Reached]:
    with reached_centre(tmp_path) as running:
        yield running


@pytest.fixture
def operators(reached: Reached, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Operators:
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("FEDMESH_SESSION", str(tmp_path / "session.json"))
    monkeypatch.chdir(tmp_path)
    keys = [MemberKeys.generate(name) for name in HOSPITALS]
    statement = found(CONSORTIUM, [one.public() for one in keys])
    signatures = {one.hospital_id: sign_roster(statement, one) for one in keys}
    save_roster_file(tmp_path / "roster.json", statement, signatures)
    (tmp_path / "roster.unsigned").write_bytes(statement)
    for name, signature in signatures.items():
        said = {"hospital_id": name, "signature": signature.hex()}
        (tmp_path / f"{name}.signature").write_text(json.dumps(said), encoding="utf-8")
    files = [
        centre_file(
            tmp_path / f"{name}.yaml",
            reached.targets,
            reached.stack.operator(name),
            log_key=str(reached.stack.audit_verifier),
            roster="roster.json",
            enrolment="enrol.example:8443",
        )
        for name in ("ann", "bob")
    ]
    monkeypatch.setenv(places.VARIABLE, str(files[0]))
    return Operators(*files)


def test_every_command_at_a_centre_elsewhere(reached: Reached, operators: Operators, tmp_path: Path) -> None:
    fedmesh, bob = operators, ("--centre", str(operators.bob))
    seen = fedmesh("status")
    assert seen.count("serving") == 4
    assert "spiffe://consortium.local/operator/ann" in seen
    checked = fedmesh("doctor", "--centre", str(operators.ann))
    assert checked.count("serves this release's calls") == 4
    assert "nothing is witnessed yet; 3 of 4" in checked

    _members(fedmesh, bob)
    published = fedmesh("roster", "publish", "roster.unsigned", *(f"{name}.signature" for name in HOSPITALS))
    assert "4 members, 3 must agree" in published
    assert "roster version 1" in fedmesh("roster", "show")
    fedmesh("epochs")
    _jobs_and_models(fedmesh, asyncio.run(_ended_job()))

    assert "no hospital has reported anything" in fedmesh.refused("privacy", "ledger", "--registry")
    assert "--registry shows what it reported" in fedmesh.refused("privacy", "ledger")
    fedmesh("privacy", "reconcile")
    _log(fedmesh, reached, tmp_path)
    assert "sign_in" in fedmesh.refused("login", *bob)

    assert _commands_with_centre() <= fedmesh.ran

    # A replica that ends is not missed, and a service that is away altogether is named.
    reached.lose_first("registry")
    assert "h1" in fedmesh("hospitals")
    targets = {**reached.targets, "coordinator": {"target": "127.0.0.1:1"}}
    away = centre_file(tmp_path / "away.yaml", targets, reached.stack.operator("ann"))
    shown = fedmesh("hospitals", "--centre", str(away))
    assert "who is connected" in shown
    assert fedmesh.run("status", "--centre", str(away)).exit_code == 3
    doctor = fedmesh.run("doctor", "--json", "--centre", str(away))
    failed = [item for item in json.loads(doctor.output)["findings"] if item["level"] == "FAIL"]
    assert [(item["check"], "127.0.0.1:1" in item["seen"]) for item in failed] == [("reaches coordinator", True)]


def _members(fedmesh: Operators, bob: tuple[str, str]) -> None:
    for name in (*HOSPITALS, "h5"):
        fedmesh("members", "register", name)
    assert "h5 is suspended" in fedmesh("members", "suspend", "h5", "--reason", "tried")
    proposed = fedmesh("members", "reinstate", "h5", "--reason", "repaired").split()[-1]
    assert "another operator" in fedmesh.refused("members", "approve", proposed)
    assert "h5 is active again" in fedmesh("members", "approve", proposed, *bob)
    invited = fedmesh("members", "invite", "h5", "--out", "h5.token")
    assert "enrol.example:8443" in invited
    assert "one operator's certificate" in fedmesh.refused("members", "changes", "--operator", "second-operator")
    removed = fedmesh("members", "remove", "h5", "--reason", "gone").split()[-1]
    assert "removed for good" in fedmesh("members", "approve", removed, *bob)
    assert removed in fedmesh("members", "changes")
    assert "are refused within seconds" in fedmesh("members", "revoke", "h1", "--reason", "copied")
    assert "h1" in fedmesh("hospitals")


def _jobs_and_models(fedmesh: Operators, job: str) -> None:
    assert job in fedmesh("jobs")
    fedmesh("rounds")
    assert f"job {job} cancelled" in fedmesh("rounds", "watch", job[:8])
    fedmesh("models")
    fedmesh("models", "aliases")
    fedmesh("models", "performance")
    for command, *more in (
        ("lineage",),
        ("card",),
        ("checks",),
        ("promote",),
        ("alias", "candidate"),
        ("tag", "seen", "yes"),
    ):
        assert re.search("no (job|version)", fedmesh.refused("models", command, NO_VERSION, *more))


def _log(fedmesh: Operators, reached: Reached, folder: Path) -> None:
    assert "nothing yet" in fedmesh("audit", "status")
    fedmesh("audit", "export", "--out", "log")
    assert "OK" in fedmesh("audit", "verify", "log", "--key", str(reached.stack.audit_verifier))
    assert "no checkpoint is witnessed" in fedmesh.refused("audit", "export", "--witnessed", "--out", "log-2")
    database = reached.stack.postgres.config("audit_service")
    settings = {"dsn": database.dsn, "password_file": str(database.password_file)}
    (folder / "database.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert "OK" in fedmesh("audit", "fsck", "--config", "database.yaml")
    assert "nothing to archive" in fedmesh("audit", "archive", "archives", "--config", "database.yaml")
    both = ("--centre", str(fedmesh.ann))
    for command in (("fsck",), ("archive", "archives")):
        assert "give both" in fedmesh.refused("audit", *command, *both)


async def _ended_job() -> str:
    """A job that was never run, made by two operators at the centre of the environment."""
    named = places.named_centre(None)
    assert named is not None
    second = places.load_centre(named.file.with_name("bob.yaml"))
    async with stub(named, "registry") as registry, stub(second, "registry") as other:
        plan = canonical_bytes(shipped_plan("readmission-logistic"))
        plan_id = (await call(registry.CreatePlan, _asked("CreatePlan", manifest=plan))).plan.plan_id
        await call(other.ApprovePlan, _asked("ApprovePlan", plan_id=plan_id))
        job = await call(registry.CreateJob, _asked("CreateJob", plan_id=plan_id, hospital_ids=HOSPITALS))
        job_id = str(job.job.job_id)
        await call(registry.EndJob, _asked("EndJob", job_id=job_id, status=registry_pb2.JOB_STATUS_CANCELLED))
        return job_id


def _asked(method: str, **fields: Any) -> Any:
    make: Callable[..., Any] = getattr(registry_pb2, f"{method}Request")
    return make(request_id=new_id(), **fields)


def _commands_with_centre() -> set[str]:
    """Every command that has the option."""

    def walk(group: Any, path: str = "") -> Iterator[str]:
        for name, command in getattr(group, "commands", {}).items():
            yield from walk(command, f"{path} {name}".strip())
        if any(parameter.name == "centre" for parameter in group.params):
            yield path

    return set(walk(typer.main.get_command(app)))
