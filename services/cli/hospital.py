"""`fedmesh hospital`: what a hospital does by itself before it joins."""

from pathlib import Path
from typing import Annotated

import typer

from services.cli import hospital_data
from services.common.errors import Code, FedmeshError

app = typer.Typer(help="A hospital's own keys and data.", no_args_is_help=True)
hospital_data.register(app)


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
