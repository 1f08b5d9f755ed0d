"""`fedmesh members`: who may take part. Registering, inviting, suspending, reinstating, removing, revoking."""

import os
import re
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from fedmesh.registry.v1 import enrolment_pb2, registry_pb2

from services.cli.inspection import stack_dir
from services.cli.mesh import ask
from services.cli.stack import UP_DIR, Folder
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


@app.command()
def register(
    hospital: Hospital,
    name: Annotated[str, typer.Option(help="Its name for people")] = "",
    folder: Folder = UP_DIR,
) -> None:
    """Add a hospital to the consortium. It can enrol once it is invited."""
    request = registry_pb2.RegisterHospitalRequest(request_id=new_id(), hospital_id=hospital, display_name=name)
    _tell(folder, "registry", "RegisterHospital", request)
    typer.echo(f"{hospital} is registered. Next: fedmesh members invite {hospital}")


@app.command()
def invite(
    hospital: Hospital,
    out: Annotated[Path, typer.Option(help="New file (mode 0600) for the token: bring it to the hospital's admin")],
    valid: Annotated[str, typer.Option(help="How long the token may be used, such as 30m, 24h or 7d")] = "24h",
    folder: Folder = UP_DIR,
) -> None:
    """Let a registered hospital enrol, once. An earlier invitation that was not used is withdrawn.

    The token is made here; the registry gets its digest only. Who has it can enrol as this hospital: bring it by a way
    that only the hospital's admin can read, and the authority's file by one that nobody can change.
    """
    token = Token.generate(require_name(hospital, "hospital"))
    request = enrolment_pb2.InviteHospitalRequest(
        request_id=new_id(), hospital_id=hospital, token_sha256=token.sha256, valid_s=_seconds(valid)
    )
    # First the file: a token that nobody has would be of no use.
    _write_token(out, token)
    try:
        answer = _tell(folder, "credentials", "InviteHospital", request)
    except FedmeshError:
        out.unlink()
        raise
    stack = Stack(stack_dir(folder))
    typer.echo(f"{hospital} may enrol once, until {answer.expires_at.ToDatetime():%Y-%m-%d %H:%M} UTC. Give its admin")
    typer.echo(f"  the token:      {out}")
    typer.echo(f"  the authority:  {stack.ca_file}")
    typer.echo(f"  the address:    {stack.target(ENROLMENT)}")


@app.command()
def suspend(hospital: Hospital, reason: Reason, folder: Folder = UP_DIR) -> None:
    """Refuse a hospital everywhere within seconds, until it is reinstated. The others get new keys."""
    _set_status(folder, hospital, registry_pb2.HOSPITAL_STATUS_SUSPENDED, reason)
    typer.echo(
        f"{hospital} is suspended: every service refuses it within seconds, and the next keys are made without it."
    )


@app.command()
def reinstate(hospital: Hospital, reason: Reason, folder: Folder = UP_DIR) -> None:
    """Let a suspended hospital take part again. Its strikes are forgotten."""
    _set_status(folder, hospital, registry_pb2.HOSPITAL_STATUS_ACTIVE, reason)
    typer.echo(f"{hospital} is active again.")


@app.command()
def remove(hospital: Hospital, reason: Reason, folder: Folder = UP_DIR) -> None:
    """Refuse a hospital for good. The others then sign a roster without it: `fedmesh roster succeed`."""
    _set_status(folder, hospital, registry_pb2.HOSPITAL_STATUS_REMOVED, reason)
    typer.echo(f"{hospital} is removed for good. Next, the members sign a roster without it: fedmesh roster succeed")


@app.command()
def revoke(hospital: Hospital, reason: Reason, folder: Folder = UP_DIR) -> None:
    """Make all certificates of a hospital worthless, and its open invitation: when somebody may have copied its key."""
    request = enrolment_pb2.RevokeCertificatesRequest(request_id=new_id(), hospital_id=hospital, reason=reason)
    _tell(folder, "credentials", "RevokeCertificates", request)
    typer.echo(f"The certificates of {hospital} are refused within seconds. Next: fedmesh members invite {hospital}")


def _set_status(folder: Path, hospital: str, status: Any, reason: str) -> None:
    request = registry_pb2.SetHospitalStatusRequest(
        request_id=new_id(), hospital_id=hospital, status=status, reason=reason
    )
    _tell(folder, "registry", "SetHospitalStatus", request)


def _tell(folder: Path, service: str, method: str, request: Any) -> Any:
    async def go(opened: Any) -> Any:
        return await call(getattr(opened, method), request)

    return ask(stack_dir(folder), service, go, _NEEDS)


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
