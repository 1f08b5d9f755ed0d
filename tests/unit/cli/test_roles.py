"""What somebody with one role sees of a consortium: every command that looks, against the policy of the services."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import typer
from fedmesh.audit.v1 import audit_pb2
from fedmesh.registry.v1 import registry_pb2
from typer.testing import CliRunner, Result

from services.cli import mesh, people
from services.cli.main import app
from services.common.config import RoleName
from services.common.errors import Code, FedmeshError
from services.common.grpc.access import load_policy
from services.common.people.person import Person, require_rights
from services.embedded.stack import SERVICES, Part, Stack
from services.plans.manifest import canonical_bytes, load_manifest
from services.secure_sum.roster import MemberKeys, found
from services.transparency.checkpoint import Checkpoint, generate_key, load_signing_key, sign_checkpoint
from services.transparency.merkle import leaf_hash

JOB: Final = "5d7ce7a0-0000-4000-8000-000000000001"
PLAN: Final = Path(__file__).parents[3] / "plans" / "readmission-logistic.yaml"
MEMBERS: Final = [MemberKeys.generate(f"hospital-{number:02d}").public() for number in range(1, 5)]
ENDED = registry_pb2.Job(job_id=JOB, status=registry_pb2.JOB_STATUS_COMPLETED, version=1, rounds=1)

# What services say to those whom they let in; whatever is not here is answered by an empty message.
ANSWERS: Final[dict[str, Any]] = {
    "GetJob": registry_pb2.GetJobResponse(job=ENDED),
    "GetPlan": registry_pb2.GetPlanResponse(plan=registry_pb2.Plan(manifest=canonical_bytes(load_manifest(PLAN)))),
    "ListHospitals": registry_pb2.ListHospitalsResponse(hospitals=[registry_pb2.Hospital(hospital_id="north")]),
    "ListJobs": registry_pb2.ListJobsResponse(jobs=[ENDED]),
    "ListRosters": registry_pb2.ListRostersResponse(
        rosters=[registry_pb2.Roster(statement=found("consortium.local", MEMBERS))]
    ),
}

# Commands that look, with the words that somebody reads whose only role is `sre` where a part of the answer is for
# others.
SEES: Final[dict[tuple[str, ...], str]] = {
    ("status",): "",
    ("doctor",): "may not call ListLedgers: it needs one of the roles auditor, consortium-admin, researcher",
    ("hospitals",): "",
    ("jobs",): "",
    ("rounds",): "loss and AUROC: sam may not call ListMetrics: it needs one of the roles auditor,",
    ("rounds", "watch"): "loss and AUROC: sam may not call ListMetrics: it needs one of the roles auditor,",
    ("rounds", "watch", JOB[:8]): "loss and AUROC: sam may not call ListMetrics: it needs one of the roles auditor,",
    ("epochs",): "",
    ("roster", "show"): "",
    ("audit", "status"): "",
    ("members", "changes"): "",
    ("models",): "",
    ("models", "aliases"): "",
    ("models", "card", f"{JOB}/1"): "",
    ("models", "checks", f"{JOB}/1"): "",
    ("models", "lineage", f"{JOB}/1"): "",
}
# Commands that look at what is not for an SRE: they end with exit code 1, and say for whom it is.
REFUSED: Final = {
    ("audit", "export", "--out", "log"): "ListEntries: it needs one of the roles auditor, consortium-admin; held: sre",
    ("models", "performance"): "ListPerformance: it needs one of the roles auditor, consortium-admin, researcher",
    ("privacy", "ledger", "--registry"): "ListLedgers: it needs one of the roles auditor, consortium-admin, researcher",
    ("privacy", "reconcile"): "ListLedgers: it needs one of the roles auditor, consortium-admin, researcher",
}
# What changes something, or asks no service as an operator.
OTHERS: Final = {
    *(("audit", name) for name in ("archive", "evidence", "fsck", "receipt", "verify")),
    *(("models", name) for name in ("alias", "promote", "pull", "tag")),
    *(("privacy", name) for name in ("approve", "approve-recovery", "keygen")),
    *(("roster", name) for name in ("assemble", "check", "found", "publish", "sign", "succeed")),
    *(("members", name) for name in ("approve", "invite", "register", "reinstate", "remove", "revoke", "suspend")),
    *((name,) for name in ("bench", "hospital", "plan")),
    *((name,) for name in ("demo", "down", "login", "logout", "migrate", "policy", "up", "whoami")),
}


class Channel:
    """The mesh as a person with one role meets it: the services' own policy, and answers that do not matter."""

    person: Person
    policy = load_policy(people._services())

    def __init__(self, *_arguments: Any, **_options: Any) -> None:
        self.unary_unary = self._single
        self.unary_stream = self._stream

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def stub(self, made: Callable[[Any], Any]) -> Any:
        return made(self)

    def stream_unary(self, *_arguments: Any, **_options: Any) -> None:
        """No command that looks sends a stream."""

    stream_stream = stream_unary

    def _single(self, path: str, response_deserializer: Any, **_options: Any) -> Any:
        async def answer(_request: Any, **_call: Any) -> Any:
            self._require_rights(path)
            return ANSWERS.get(path.rsplit("/", 1)[1]) or response_deserializer(b"")

        return answer

    def _stream(self, path: str, **_options: Any) -> Any:
        async def answer(_request: Any, **_call: Any) -> AsyncIterator[Any]:
            self._require_rights(path)
            nothing: tuple[Any, ...] = ()
            for item in nothing:
                yield item

        return answer

    def _require_rights(self, path: str) -> None:
        require_rights(self.person, self.policy[path], path.rsplit("/", 1)[1])


@pytest.fixture
def fedmesh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command on a stack whose parts run, as somebody with one role."""
    for name in ("ca", "config", "hospitals/north", "keys"):
        (tmp_path / name).mkdir(parents=True)
    log = "consortium.local/audit"
    (tmp_path / "keys" / "audit.vkey").write_text(generate_key(tmp_path / "audit.key", log), encoding="utf-8")
    note = sign_checkpoint(Checkpoint(log, 1, leaf_hash(b"{}")), load_signing_key(tmp_path / "audit.key"))
    monkeypatch.setitem(ANSWERS, "GetCheckpoint", audit_pb2.GetCheckpointResponse(checkpoint=note))
    parts = [Part(name, True, 1, "", tmp_path / name) for name in ("postgres", "redis", *SERVICES)]
    monkeypatch.setattr(Stack, "status", lambda _stack: parts)
    monkeypatch.setattr(Stack, "target", lambda _stack, _service: "")
    monkeypatch.setattr(Stack, "operator", lambda _stack, _name: None)
    monkeypatch.setattr(mesh, "MeshChannel", Channel)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)

    def run(role: RoleName, *arguments: str) -> Result:
        monkeypatch.setattr(Channel, "person", Person("sam", frozenset({role}), True, float("inf")), raising=False)
        where = () if arguments[0] == "policy" else ("--dir", str(tmp_path))
        return CliRunner().invoke(app, [*arguments, *where])

    return run


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All commands of the command line, as people type them."""
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))
    if path and (not hasattr(group, "commands") or group.invoke_without_command):
        yield path


def test_every_command_has_its_place_here() -> None:
    placed = {tuple(word for word in key if word[0].isalpha()) for key in (*SEES, *REFUSED, *OTHERS)}
    for path in commands(typer.main.get_command(app)):
        assert any(path[: len(one)] == one or path == one[: len(path)] for one in placed), path


@pytest.mark.parametrize("command", SEES, ids=" ".join)
def test_what_an_sre_may_see_is_shown_and_what_is_not_names_the_roles(
    fedmesh: Callable[..., Result], command: tuple[str, ...]
) -> None:
    ended = fedmesh("sre", *command)
    assert ended.exit_code == 0, ended.output
    assert SEES[command] in ended.output
    assert ("needs one of the roles" in ended.output) == bool(SEES[command])


@pytest.mark.parametrize("command", REFUSED, ids=" ".join)
def test_what_is_for_others_is_refused_with_their_roles(
    fedmesh: Callable[..., Result], command: tuple[str, ...]
) -> None:
    ended = fedmesh("sre", *command)
    assert isinstance(ended.exception, FedmeshError)
    assert ended.exception.code is Code.PERMISSION_DENIED
    assert REFUSED[command] in ended.exception.message


def test_an_auditor_sees_the_ledgers_too(fedmesh: Callable[..., Result]) -> None:
    assert fedmesh("auditor", "privacy", "reconcile").exit_code == 0
    assert "needs one of the roles" not in fedmesh("auditor", "doctor").output


def test_who_is_connected_is_not_for_a_hospitals_admin(fedmesh: Callable[..., Result]) -> None:
    ended = fedmesh("hospital-admin", "hospitals")
    assert ended.exit_code == 0
    assert "who is connected: sam may not call ListParticipants: it needs one of the roles auditor" in ended.output


def test_the_policy_that_is_printed_is_whole(fedmesh: Callable[..., Result]) -> None:
    shown = fedmesh("sre", "policy").output
    assert all(path.split(".")[-1].replace("/", ".") in shown for path in Channel.policy if "fedmesh" in path)
