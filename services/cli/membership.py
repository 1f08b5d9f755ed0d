"""`fedmesh members`: who may take part. One person suspends and revokes; two invite, reinstate and remove."""

import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from fedmesh.registry.v1 import enrolment_pb2, membership_pb2, registry_pb2
from rich.console import Console
from rich.markup import escape

from services.cli.centre import OPERATOR, CentreFile, Place, RemoteCentre, find_place
from services.cli.mesh import ask
from services.cli.stack import UP_DIR, UpDir
from services.cli.tables import make_table
from services.cli.tokens import Token
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id, require_name
from services.embedded.stack import ENROLMENT, Stack

app = typer.Typer(
    help="Who may take part: the consortium's admin registers, invites, suspends, removes.", no_args_is_help=True
)

_NEEDS: Final = ("audit", "registry")
_TIME: Final = re.compile(r"(\d{1,5})([smhd])")
_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}

Hospital = Annotated[str, typer.Argument(help="The hospital's name, as in its certificate")]
Reason = Annotated[str, typer.Option(help="Why, for the audit log")]
Operator = Annotated[
    str, typer.Option(help="Whose certificate of a stack calls; where people sign in, they count and not it")
]

_DONE: Final = {
    membership_pb2.MEMBERSHIP_CHANGE_KIND_INVITE: "{hospital} may enrol once, until {until:%Y-%m-%d %H:%M} UTC.",
    membership_pb2.MEMBERSHIP_CHANGE_KIND_REINSTATE: "{hospital} is active again.",
    membership_pb2.MEMBERSHIP_CHANGE_KIND_REMOVE: "{hospital} is removed for good. Next, the members sign a roster"
    " without it: fedmesh roster succeed",
}


@app.command()
def register(
    hospital: Hospital,
    name: Annotated[str, typer.Option(help="Its name for people")] = "",
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Note a hospital's name. It can enrol once it is invited, which takes two people."""
    request = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=hospital, display_name=name)
    _tell(find_place(folder, centre, UP_DIR), "registry", "RegisterHospital", request, operator)
    typer.echo(f"{hospital} is registered. Next: fedmesh members invite {hospital}")


@app.command()
def invite(
    hospital: Hospital,
    out: Annotated[Path, typer.Option(help="New file (mode 0600) for the token: bring it to the hospital's admin")],
    valid: Annotated[
        str, typer.Option(help="How long the token may be used once it is approved, such as 30m, 24h or 7d")
    ] = "24h",
    reason: Annotated[str, typer.Option(help="Why, for whoever approves and for the audit log")] = "",
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Propose that a registered hospital may enrol, once. When it is approved, its earlier open invitation ends.

    The token is made here; the registry gets its digest only, and it opens nothing before the approval. Who has it can
    then enrol as this hospital: bring it by a way that only the hospital's admin can read, and the authority's file by
    one that nobody can change.
    """
    place = find_place(folder, centre, UP_DIR)
    found = place if isinstance(place, RemoteCentre) else Stack(place)
    token = Token.generate(require_name(hospital, "hospital"))
    valid_s = _seconds(valid)
    # First the file: a token that nobody has would be of no use.
    _write_token(out, token)
    try:
        change = _propose(place, operator, "INVITE", hospital, reason, token_sha256=token.sha256, valid_s=valid_s)
    except FedmeshError:
        out.unlink()
        raise
    typer.echo(f"Proposed that {hospital} may enrol once. Once it is approved, give its admin")
    typer.echo(f"  the token:      {out}")
    typer.echo(f"  the authority:  {found.ca_file}")
    typer.echo(f"  the address:    {_door(found)}")
    _next(change)


@app.command()
def suspend(
    hospital: Hospital,
    reason: Reason,
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Refuse a hospital everywhere within seconds, until it is reinstated. The others get new keys.

    What was proposed about it ends, also when it is suspended already: who suspends it anew may know something new.
    """
    request = registry_pb2.SetHospitalStatusRequest(
        request_id=new_id(), hospital_id=hospital, status=registry_pb2.HOSPITAL_STATUS_SUSPENDED, reason=reason
    )
    _tell(find_place(folder, centre, UP_DIR), "registry", "SetHospitalStatus", request, operator)
    typer.echo(
        f"{hospital} is suspended: every service refuses it within seconds, and the next keys are made without it."
    )


@app.command()
def reinstate(
    hospital: Hospital,
    reason: Reason,
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Propose that a suspended hospital takes part again. Its strikes are then forgotten."""
    change = _propose(find_place(folder, centre, UP_DIR), operator, "REINSTATE", hospital, reason)
    typer.echo(f"Proposed that {hospital} takes part again.")
    _next(change)


@app.command()
def remove(
    hospital: Hospital,
    reason: Reason,
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Propose that a hospital is refused for good. To refuse it at once, suspend it first."""
    change = _propose(find_place(folder, centre, UP_DIR), operator, "REMOVE", hospital, reason)
    typer.echo(
        f"Proposed that {hospital} is removed for good. It is refused once this is approved; to refuse it at once,"
    )
    typer.echo(
        f"fedmesh members suspend {hospital}, and then propose this again: a new standing ends what was proposed."
    )
    _next(change)


@app.command()
def changes(folder: UpDir = None, operator: Operator = OPERATOR, centre: CentreFile = None) -> None:
    """List what was proposed, newest first, and who approved it."""
    answer = _tell(
        find_place(folder, centre, UP_DIR),
        "membership",
        "ListMembershipChanges",
        membership_pb2.ListMembershipChangesRequest(),
        operator,
    )
    table = make_table("change", "what", "why", "proposed by", "state")
    table.columns[0].no_wrap = True
    for change in answer.changes:
        proposer = change.proposed_by.rpartition("/")[2]
        table.add_row(
            change.change_id, f"{_what(change)} {change.hospital_id}", escape(change.reason), proposer, _state(change)
        )
    Console().print(table)


@app.command()
def approve(
    change: Annotated[str, typer.Argument(help="The change's id: `fedmesh members changes` lists them")],
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Approve a change that another operator proposed; it takes effect at once."""
    request = membership_pb2.ApproveMembershipChangeRequest(request_id=new_id(), change_id=change)
    done = _tell(find_place(folder, centre, UP_DIR), "membership", "ApproveMembershipChange", request, operator).change
    typer.echo(_DONE[done.kind].format(hospital=done.hospital_id, until=done.token_expires_at.ToDatetime()))


@app.command()
def revoke(
    hospital: Hospital,
    reason: Reason,
    folder: UpDir = None,
    operator: Operator = OPERATOR,
    centre: CentreFile = None,
) -> None:
    """Make all certificates of a hospital worthless, and its open invitation: when somebody may have copied its key."""
    request = enrolment_pb2.RevokeCertificatesRequest(request_id=new_id(), hospital_id=hospital, reason=reason)
    _tell(find_place(folder, centre, UP_DIR), "credentials", "RevokeCertificates", request, operator)
    typer.echo(f"The certificates of {hospital} are refused within seconds. Next: fedmesh members invite {hospital}")


def _door(found: Stack | RemoteCentre) -> str:
    """Where hospitals enrol, as far as it is known here."""
    try:
        return found.target(ENROLMENT)
    except FedmeshError as error:
        return f"HOST:PORT, from who runs the centre: {error.message}"


def _propose(
    place: Place, operator: str, kind: str, hospital: str, reason: str, **facts: Any
) -> membership_pb2.MembershipChange:
    number = membership_pb2.MembershipChangeKind.Value(f"MEMBERSHIP_CHANGE_KIND_{kind}")
    request = membership_pb2.ProposeMembershipChangeRequest(
        request_id=new_id(), kind=number, hospital_id=hospital, reason=reason, **facts
    )
    answer = _tell(place, "membership", "ProposeMembershipChange", request, operator)
    change: membership_pb2.MembershipChange = answer.change
    return change


def _next(change: membership_pb2.MembershipChange) -> None:
    until = f"{change.expires_at.ToDatetime():%Y-%m-%d %H:%M} UTC"
    typer.echo(f"Next, another operator, until {until}: fedmesh members approve {change.change_id}")


def _what(change: membership_pb2.MembershipChange) -> str:
    return membership_pb2.MembershipChangeKind.Name(change.kind).removeprefix("MEMBERSHIP_CHANGE_KIND_").lower()


def _state(change: membership_pb2.MembershipChange) -> str:
    if change.approved_by:
        return f"approved by {change.approved_by.rpartition('/')[2]}"
    if change.overtaken:
        return "ended: the hospital's standing was decided anew"
    ending = change.expires_at.ToDatetime(tzinfo=UTC)
    return "expired" if ending <= datetime.now(UTC) else f"open until {ending:%Y-%m-%d %H:%M} UTC"


def _tell(place: Place, service: str, method: str, request: Any, operator: str) -> Any:
    async def go(opened: Any) -> Any:
        return await call(getattr(opened, method), request)

    return ask(place, service, go, _NEEDS, operator)


def _seconds(text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"--valid {text}: use a number and s, m, h or d, such as 24h")
    return int(timedelta(**{_UNITS[match[2]]: int(match[1])}).total_seconds())


def _write_token(path: Path, token: Token) -> None:
    try:
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{token.text}\n")
    except FileExistsError:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} exists already: name a new file") from None
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot write {path}: {error.strerror}") from error
