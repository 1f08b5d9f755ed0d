"""`fedmesh roster`: founding a consortium by hand, and changing who is in it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from services.cli.centre import CentreFile, find_place
from services.cli.stack import UP_DIR, UpDir
from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import (
    MemberKeys,
    Roster,
    as_roster,
    found,
    load_roster_file,
    save_roster_file,
    sign_roster,
    succeed,
    verify_founding,
)
from services.secure_sum.statements import RosterMember

app = typer.Typer(
    help="Who is a member, with which keys: `found`, then everybody `sign`s, then `assemble`; `succeed` for a change.",
    no_args_is_help=True,
)
Cards = Annotated[list[Path], typer.Argument(help="Public cards of all members, from `fedmesh hospital keygen`")]
Statement = Annotated[Path, typer.Argument(help="The roster to be signed, from `found` or `succeed`")]
Signatures = Annotated[list[Path], typer.Argument(help="The members' signatures, from `sign`")]


@app.command("found")
def found_command(
    cards: Cards,
    consortium: Annotated[str, typer.Option(help="The consortium's name, as in its certificates")],
    out: Annotated[Path, typer.Option(help="New file for the roster, for every member to sign")],
) -> None:
    """Write the founding roster of a consortium. It counts when every member has signed it."""
    statement = found(consortium, [_card(path) for path in cards])
    _write(out, statement)
    _describe(as_roster(statement), out)


@app.command("succeed")
def succeed_command(
    current: Annotated[Path, typer.Argument(help="The roster before, without its signatures")],
    cards: Cards,
    out: Annotated[Path, typer.Option(help="New file for the roster, for members of the one before to sign")],
) -> None:
    """Write the roster that follows another. It counts when enough members of the one before have signed it."""
    before = as_roster(_read(current))
    statement = succeed(before, [_card(path) for path in cards])
    _write(out, statement)
    _describe(as_roster(statement), out)
    typer.echo(f"needs the signatures of {before.threshold} of the {before.size} members of version {_version(before)}")


@app.command()
def sign(
    statement: Statement,
    keys: Annotated[Path, typer.Option(help="This hospital's private keys, from `fedmesh hospital keygen`")],
    out: Annotated[Path, typer.Option(help="New file for the signature")],
) -> None:
    """Sign a roster as one hospital. Compare the keys in it with the cards that you were given first.

    Sign one successor of a roster and never a second one: two would split the consortium.
    """
    content, member = _read(statement), MemberKeys.load(keys)
    signature = sign_roster(content, member)
    _write(out, json.dumps({"hospital_id": member.hospital_id, "signature": signature.hex()}).encode())
    _describe(as_roster(content), statement)
    typer.echo(f"signed as {member.hospital_id}: {out}")


@app.command()
def assemble(
    statement: Statement,
    signatures: Signatures,
    out: Annotated[Path, typer.Option(help="New file: `roster` of every hospital's node")],
) -> None:
    """Put a founding roster and everybody's signatures together. Bring the file to every hospital out of band."""
    content, signed = _read(statement), _signatures(signatures)
    save_roster_file(out, content, signed)
    _describe(verify_founding(content, signed), out)


@app.command()
def check(roster: Annotated[Path, typer.Argument(help="A founding roster, from `assemble`")]) -> None:
    """Check a founding roster with all its signatures, and print what it says."""
    _describe(load_roster_file(roster), roster)


@app.command()
def publish(statement: Statement, signatures: Signatures, folder: UpDir = None, centre: CentreFile = None) -> None:
    """Bring a signed roster to the registry, as an operator. Its members must be registered."""
    from fedmesh.common.v1 import round_pb2
    from fedmesh.registry.v1 import registry_pb2

    from services.cli.mesh import ask
    from services.common.grpc.client import call
    from services.common.ids import new_id

    request = registry_pb2.PublishRosterRequest(
        request_id=new_id(),
        statement=_read(statement),
        signatures=[
            round_pb2.Signature(hospital_id=name, signature=value) for name, value in _signatures(signatures).items()
        ],
    )
    place = find_place(folder, centre, UP_DIR)
    answer = ask(place, "registry", lambda registry: call(registry.PublishRoster, request), ("audit", "registry"))
    _describe(as_roster(answer.roster.statement), statement)


def _describe(roster: Roster, path: Path) -> None:
    typer.echo(
        f"{path}: {roster.statement.consortium}, version {_version(roster)}, SHA-256 {roster.sha256}\n"
        f"{roster.size} members, {roster.threshold} must agree, {roster.colluders} may collude:"
    )
    for member in roster.statement.members:
        typer.echo(f"  {member.hospital_id}  signing {member.signing_key}  sealing {member.sealing_key}")


def _version(roster: Roster) -> int:
    return roster.statement.version


def _card(path: Path) -> RosterMember:
    try:
        return RosterMember.model_validate_json(_read(path))
    except ValueError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{path} is no card of `fedmesh hospital keygen`") from error


def _signatures(paths: Sequence[Path]) -> dict[str, bytes]:
    found_signatures = {}
    for path in paths:
        try:
            document = json.loads(_read(path))
            found_signatures[str(document["hospital_id"])] = bytes.fromhex(document["signature"])
        except (ValueError, KeyError, TypeError) as error:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"{path} is no signature of `fedmesh roster sign`") from error
    return found_signatures


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot read {path}: {error.strerror}") from error


def _write(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content + b"\n")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {path}: {error.strerror}") from error
