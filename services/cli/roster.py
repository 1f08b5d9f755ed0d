"""`fedmesh hospital keygen` and `fedmesh roster ...`: founding a consortium by hand, without trusting the centre."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from services.common.errors import Code, FedmeshError
from services.plans.document import read_file, validate_json
from services.secure_sum.cohort import colluders
from services.secure_sum.roster import (
    MemberKeys,
    as_roster,
    found,
    load_roster_file,
    read_roster_file,
    save_roster_file,
    sign_roster,
)
from services.secure_sum.statements import RosterMember

hospital_app = typer.Typer(help="What a hospital does by itself.", no_args_is_help=True)
app = typer.Typer(help="The list of hospitals and their public keys, signed by the hospitals.", no_args_is_help=True)


@hospital_app.callback()
def _hospital() -> None:
    """What a hospital does by itself."""


@hospital_app.command()
def keygen(
    hospital_id: Annotated[str, typer.Option(help="The hospital's name, as in its certificate")],
    out: Annotated[Path, typer.Option(help="New file for the private keys, mode 0600; back it up, never share it")],
) -> None:
    """Make this hospital's signing and sealing keys, and print its public card for the founding roster."""
    keys = MemberKeys.generate(hospital_id)
    keys.save(out)
    typer.echo(keys.public().model_dump_json())


@app.command("found")
def found_roster(
    cards: Annotated[list[Path], typer.Argument(help="Public cards, one file a hospital")],
    consortium: Annotated[str, typer.Option(help="Name of the consortium, as in the certificates")],
    out: Annotated[Path, typer.Option(help="New file for the statement that every hospital signs")],
) -> None:
    """Write the founding roster from the hospitals' public cards. Compare the cards out of band first."""
    members = [
        validate_json(RosterMember, read_file(path, Code.CONFIG_INVALID), f"card {path.name}", Code.CONFIG_INVALID)
        for path in cards
    ]
    _write_new(out, found(consortium, members))
    typer.echo(f"{out}: {len(members)} hospitals, SHA-256 {as_roster(out.read_bytes()).sha256}")


@app.command()
def sign(
    statement: Annotated[Path, typer.Argument(help="The roster's statement")],
    keys: Annotated[Path, typer.Option(help="This hospital's keys, from `fedmesh hospital keygen`")],
) -> None:
    """Print this hospital's signature under a roster. Sign one successor of a roster, never a second one."""
    own = MemberKeys.load(keys)
    signature = sign_roster(read_file(statement, Code.CONFIG_INVALID), own)
    typer.echo(json.dumps({"hospital_id": own.hospital_id, "signature": signature.hex()}))


@app.command()
def assemble(
    statement: Annotated[Path, typer.Argument(help="The roster's statement")],
    signatures: Annotated[list[Path], typer.Argument(help="Files with what `fedmesh roster sign` printed")],
    out: Annotated[Path, typer.Option(help="New file: the founding roster for every hospital's configuration")],
) -> None:
    """Put statement and signatures together into the founding roster that hospitals are configured with."""
    collected: dict[str, bytes] = {}
    for path in signatures:
        try:
            content = json.loads(read_file(path, Code.CONFIG_INVALID))
            collected[str(content["hospital_id"])] = bytes.fromhex(content["signature"])
        except (ValueError, KeyError, TypeError) as error:
            raise FedmeshError(Code.CONFIG_INVALID, f"{path} is no signature of `fedmesh roster sign`") from error
    save_roster_file(out, read_file(statement, Code.CONFIG_INVALID), collected)
    typer.echo(f"{out}: signed by {len(collected)} hospitals")


@app.command()
def check(file: Annotated[Path, typer.Argument(help="A founding roster, as in a hospital's configuration")]) -> None:
    """Verify every signature of a founding roster's file, and show who is in it and what follows from its size."""
    roster = load_roster_file(file)
    signers = read_roster_file(file)[1]
    console = Console()
    table = Table("position", "hospital", "signing key", "sealing key", "signed")
    for position, member in enumerate(roster.statement.members, start=1):
        signed = "yes" if member.hospital_id in signers else "no"
        table.add_row(str(position), member.hospital_id, member.signing_key[:16], member.sealing_key[:16], signed)
    console.print(table)
    console.print(
        f"{roster.statement.consortium}, version {roster.statement.version}, SHA-256 {roster.sha256}\n"
        f"{roster.size} members: {roster.threshold} are needed for everything, {colluders(roster.size)} may collude",
        soft_wrap=True,
        highlight=False,
    )


def _write_new(path: Path, content: bytes) -> None:
    try:
        with path.open("xb") as file:
            file.write(content)
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot write {path}: {error.strerror}") from error
