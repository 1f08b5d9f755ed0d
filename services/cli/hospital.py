"""`fedmesh hospital`: what a hospital does by itself before it joins."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final

import typer

from services.cli import hospital_attacks, hospital_data, hospital_ledger
from services.cli.tokens import read_token
from services.common.credentials import ENROLMENT, CredentialFolder
from services.common.errors import Code, FedmeshError

_PATIENCE_S: Final = 20.0

app = typer.Typer(help="A hospital's own keys and data.", no_args_is_help=True)
hospital_data.register(app)
hospital_ledger.register(app)
hospital_attacks.register(app)


@app.command()
def keygen(
    hospital_id: Annotated[str, typer.Argument(help="The hospital's name, as in its certificate")],
    out: Annotated[Path, typer.Option(help="New file for the private keys (mode 0600): `member_keys` of the node")],
) -> None:
    """Make a hospital's signing and sealing keys, and print its public card.

    The keys never leave the hospital. Bring the card to the others by a way that the centre does not control; the
    roster is made of everybody's cards, and whoever signs it vouches for them.
    """
    from pydantic import ValidationError

    from services.plans.document import canonical_json
    from services.secure_sum.roster import MemberKeys

    keys = MemberKeys.generate(hospital_id)
    try:
        card = canonical_json(keys.public())
    except ValidationError:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, f"{hospital_id!r} is no hospital name: use lower-case letters, digits and hyphens"
        ) from None
    keys.save(out)
    typer.echo(card.decode("ascii"))


@app.command()
def enrol(
    token_file: Annotated[Path, typer.Option(help="File (mode 0600) with the token of the invitation")],
    ca: Annotated[Path, typer.Option(help="The consortium's authority (PEM), brought by a way that you trust")],
    registry: Annotated[str, typer.Option(help="HOST:PORT at which hospitals enrol, from the invitation")],
    out: Annotated[Path, typer.Option(help="Folder for certificate and key; `renewal.folder` of the node")],
) -> None:
    """Make a key, and get this hospital's certificate for it by a one-time token.

    The key never leaves this machine. If it was interrupted, run it again: what was asked for is asked for again, and
    gets the same answer. With a new token it replaces the certificate, and all that the hospital had before are
    revoked.
    """
    from services.cli.enrolling import ask

    token = read_token(token_file)
    try:
        authority = ca.read_bytes()
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot read {ca}: {error.strerror}") from error
    folder = CredentialFolder(out, ENROLMENT)
    folder.trust(authority)
    pem = asyncio.run(ask(registry, authority, token, folder.request(token.hospital_id), _PATIENCE_S))
    certificate = folder.install(pem, token.hospital_id)
    now = datetime.now(UTC)
    if certificate.not_valid_before_utc > now:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"the certificate is here, but begins at {certificate.not_valid_before_utc:%Y-%m-%d %H:%M:%S} UTC, and this"
            f" machine's clock says {now:%Y-%m-%d %H:%M:%S}: set the clock",
        )
    ends = f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
    typer.echo(f"{token.hospital_id} is enrolled. Its certificate ends at {ends};")
    typer.echo("the node renews it by itself. In the node's configuration:\n")
    typer.echo("tls:")
    for name, path in folder.tls:
        typer.echo(f"  {name}: {path}")
    typer.echo(f"renewal:\n  folder: {folder.folder}")
    typer.echo(f"\nDelete {token_file}: the token is used.")
