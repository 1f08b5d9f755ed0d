"""What the commands about members print, from answers as the registry gives them."""

import asyncio
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import budget_pb2
from fedmesh.registry.v1 import registry_pb2 as pb

from services.cli import members
from services.common.errors import Code, FedmeshError
from services.embedded.stack import Stack
from services.secure_sum.roster import MemberKeys, as_roster, found, sign_roster
from services.secure_sum.statements import Box, EpochStatement, sign

KEYS = [MemberKeys.generate(f"hospital-{number:02d}") for number in range(1, 5)]
STATEMENT = found("consortium.test", [keys.public() for keys in KEYS])
ROSTER = as_roster(STATEMENT)


class Registry:
    """Answers every call with what it was told."""

    def __init__(self, **answers: Callable[[Any], Any]) -> None:
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        async def answer(request: Any, **_options: Any) -> Any:
            return self._answers[name](request)

        return answer


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def prepare(**answers: Callable[[Any], Any]) -> None:
        monkeypatch.setattr(
            members, "ask", lambda _folder, _service, question, _needs: asyncio.run(question(Registry(**answers)))
        )
        monkeypatch.setattr(members, "reach", lambda folder, _services: nullcontext(Stack(folder)))
        monkeypatch.setattr(members, "stub", lambda _stack, _service: nullcontext(Registry(**answers)))
        monkeypatch.setenv("COLUMNS", "160")

    return prepare


def test_hospitals_with_standing_and_strikes(
    tmp_path: Path, answering: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = pb.ListHospitalsResponse(
        hospitals=[pb.Hospital(hospital_id="north", status=pb.HOSPITAL_STATUS_SUSPENDED, strikes=7)]
    )
    answering(
        ListHospitals=lambda _: listed,
        ListBudgets=lambda _: budget_pb2.ListBudgetsResponse(
            budgets=[budget_pb2.HospitalBudget(hospital_id="north", epsilon_left=0.3)], epsilon_limit=0.5
        ),
    )
    # No coordinator runs there: who is connected is not known, and that is what is shown.
    members.hospitals(tmp_path)
    shown = capsys.readouterr().out
    (row,) = [line.split() for line in shown.splitlines() if "north" in line]
    assert row == ["north", "suspended", "7", "?", "0.3"]
    assert "epsilon left: of 0.5 in 365 days" in shown
    assert "who is connected: the coordinator does not run" in shown


def test_a_roster_with_its_signers(answering: Any, capsys: pytest.CaptureFixture[str]) -> None:
    signatures = [
        round_pb2.Signature(hospital_id=keys.hospital_id, signature=sign_roster(STATEMENT, keys)) for keys in KEYS
    ]
    stored = pb.Roster(statement=STATEMENT, signatures=signatures, sha256=ROSTER.sha256)
    answering(ListRosters=lambda _: pb.ListRostersResponse(rosters=[stored]))
    members.show()
    shown = capsys.readouterr().out
    assert ROSTER.sha256 in shown
    assert "4 members, threshold 3, at most 1 colluders; 4 signatures" in shown
    answering(ListRosters=lambda _: pb.ListRostersResponse())
    with pytest.raises(FedmeshError) as caught:
        members.show(version=2)
    assert caught.value.code is Code.NOT_FOUND


def test_epochs_newest_first(answering: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def epoch(request: pb.GetEpochRequest) -> pb.GetEpochResponse:
        statement = EpochStatement(
            roster=ROSTER.sha256,
            epoch=request.epoch or 3,
            maker=ROSTER.ids[0],
            parameter_set="bfv-n4096-q60-t48-v2",
            key_sha256="a" * 64,
            content="",
            boxes=tuple(Box(to=name, box="ab") for name in ROSTER.ids),
        )
        made = sign(statement, KEYS[0])
        signed = round_pb2.Signed(hospital_id=made.hospital_id, statement=made.statement, signature=made.signature)
        return pb.GetEpochResponse(epoch=signed, due=4, due_for_s=12, roster_sha256=ROSTER.sha256)

    answering(GetEpoch=epoch)
    members.epochs()
    shown = capsys.readouterr().out
    assert [line.split()[0] for line in shown.splitlines() if "hospital-01" in line] == ["3", "2", "1"]
    assert "Epoch 4 has been due for 12 s" in shown
    answering(GetEpoch=lambda _: pb.GetEpochResponse())
    members.epochs()
    assert "no roster yet" in capsys.readouterr().out
