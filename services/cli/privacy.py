"""`fedmesh privacy`: what has been spent, and who may spend more."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli.centre import CentreFile, Place, RemoteCentre, find_place
from services.cli.mesh import ask
from services.cli.stack import DEMO_DIR, DemoDir
from services.cli.tables import make_table
from services.common.errors import Code, FedmeshError
from services.common.ids import require_name
from services.hospital_node.store.ledger import LedgerRow, read_ledger
from services.privacy.accounting import gaussian_epsilon, gaussian_multiplier
from services.privacy.budget import DEFAULT_LIMIT

app = typer.Typer(help="Privacy spending.", no_args_is_help=True)
_NEEDS = ("audit", "registry")


@app.command()
def ledger(
    folder: DemoDir = None,
    registry: Annotated[
        bool, typer.Option("--registry", help="What hospitals reported to the registry, not their own ledgers")
    ] = False,
    centre: CentreFile = None,
) -> None:
    """Show what has been reserved and spent on each hospital's patients, by the hospitals' own ledgers."""
    place = find_place(folder, centre, DEMO_DIR)
    found = _reported_rows(place) if registry else _own_rows(place)
    table = make_table("population", "job", "epsilon", "delta", "f", "charged", "spent", "state")
    for row in found:
        table.add_row(*_ledger_cells(row))
    console = Console()
    console.print(table)
    if any(row.recovered_at for row in found):
        console.print(
            "[dim]recovered: the ledger was lost and built again. These jobs count in full from then on, and beside"
            " them what may have been spent unreported: docs/runbooks/LedgerLost.md[/dim]"
        )


@app.command()
def reconcile(folder: DemoDir = None, centre: CentreFile = None) -> None:
    """Compare the hospitals' own ledgers with what they reported to the registry. Exit code 1 for a difference.

    Entries that were not reported yet are no difference: the hospital's node reports them. Of a centre elsewhere the
    hospitals' ledgers are not here: the registry's copies are checked by themselves, and each hospital compares its own
    by `fedmesh hospital reconcile`.
    """
    from services.cli.reconciliation import check_copies, compare_ledgers, print_verdicts, reported_ledgers

    place = find_place(folder, centre, DEMO_DIR)
    if isinstance(place, RemoteCentre):
        verdicts = check_copies(ask(place, "registry", reported_ledgers, _NEEDS))
    else:
        homes = {path.name: path for path in _homes(place)}
        verdicts = compare_ledgers(homes, ask(place, "registry", reported_ledgers, _NEEDS))
    if not print_verdicts(verdicts):
        raise typer.Exit(1)


def _homes(folder: Path) -> list[Path]:
    homes = sorted(path for path in (folder / "hospitals").glob("*") if path.is_dir())
    if not homes:
        raise FedmeshError(Code.NOT_FOUND, f"no hospital has a ledger in {folder}")
    return homes


def _own_rows(place: Place) -> list[LedgerRow]:
    if isinstance(place, RemoteCentre):
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "a hospital's own ledger is at the hospital; --registry shows what it reported"
        )
    return [row for home in _homes(place) for row in read_ledger(home)]


def _reported_rows(place: Place) -> list[LedgerRow]:
    from services.cli.reconciliation import reported_ledgers, rows_of

    reported = ask(place, "registry", reported_ledgers, _NEEDS)
    if not any(ledger.entries for ledger in reported.ledgers):
        raise FedmeshError(Code.NOT_FOUND, "no hospital has reported anything to this registry")
    return [row for ledger in reported.ledgers for row in rows_of(ledger.entries)]


def _ledger_cells(row: LedgerRow) -> tuple[str, ...]:
    if not row.private:
        spent = "not private"
    elif row.charged == 0:
        spent = "0"
    else:
        multiplier = gaussian_multiplier(row.epsilon, row.delta, row.compositions)
        spent = f"{gaussian_epsilon(multiplier, row.charged, row.delta):.3f}"
    return (
        row.population,
        row.job_id[:8],
        f"{row.epsilon:g}",
        f"{row.delta:g}",
        str(row.colluders) if row.private else "",
        f"{row.charged}/{row.compositions}",
        spent,
        _state(row),
    )


def _state(row: LedgerRow) -> str:
    if row.released:
        return "released"
    if row.recovered_at is not None:
        return "spent (recovered)"
    return "reserved" if row.charged == 0 else "spent"


@app.command()
def keygen(
    name: Annotated[str, typer.Argument(help="The person's name, as in `privacy.approvers` of the node")],
    out: Annotated[Path, typer.Option(help="New file for the private key (mode 0600); it belongs to that person")],
) -> None:
    """Make a person's key for approving budgets, and print its public half for `privacy.approvers`."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from services.privacy.approval import ApproverKey

    key = ApproverKey(require_name(name, "the person's name"), Ed25519PrivateKey.generate())
    key.save(out)
    typer.echo(f"{key.name}: {key.public}")


@app.command()
def approve(
    file: Annotated[Path, typer.Argument(help="The approval: made by who signs first, `privacy.approval` of the node")],
    key: Annotated[Path, typer.Option(help="The signing person's key, from `fedmesh privacy keygen`")],
    hospital: Annotated[str, typer.Option(help="`hospital_id` of the node")],
    population: Annotated[str, typer.Option(help="`population` of the node")],
    epsilon_limit: Annotated[float, typer.Option(min=0, max=100, help="Most epsilon in any 365 days")],
    delta_limit: Annotated[float, typer.Option(min=0, max=1, help="Most delta in any 365 days")] = DEFAULT_LIMIT.delta,
) -> None:
    """Approve a budget above the default of (epsilon 0.5, delta 1e-05) for a population. Two people must sign."""
    from services.privacy.approval import NEEDED, Approval, ApproverKey, add_signature, read_approval

    approval = Approval(
        require_name(hospital, "--hospital"), require_name(population, "--population"), epsilon_limit, delta_limit
    )
    signed = add_signature(file, approval, ApproverKey.load(key), read_approval)
    typer.echo(f"{file}: {approval}; signed by {', '.join(signed)}; {NEEDED} people are needed")


@app.command("approve-recovery")
def approve_recovery(
    file: Annotated[Path, typer.Argument(help="The approval: made by who signs first, --approval of recover-ledger")],
    key: Annotated[Path, typer.Option(help="The signing person's key, from `fedmesh privacy keygen`")],
    hospital: Annotated[str, typer.Option(help="`hospital_id` of the node")],
    seq: Annotated[int, typer.Option(min=0, help="Newest entry of the registry's copy, as recover-ledger shows it")],
    sha256: Annotated[str, typer.Option(help="Its SHA-256")],
    epsilon: Annotated[float, typer.Option(min=0, max=100, help="Most epsilon that was spent and not reported")],
    delta: Annotated[float, typer.Option(min=0, max=1, help="Most delta that was spent and not reported")],
) -> None:
    """Say how much a hospital spent at most after what it had reported, when its ledger is lost. Two people must sign.

    Without it everything counts as spent for 365 days.
    """
    from services.common.ids import require_sha256
    from services.privacy.approval import NEEDED, ApproverKey, add_signature
    from services.privacy.recovery import RecoveryApproval, read_recovery_approval

    head = require_sha256(sha256, "--sha256") if seq else ""
    approval = RecoveryApproval(require_name(hospital, "--hospital"), seq, head, epsilon, delta)
    signed = add_signature(file, approval, ApproverKey.load(key), read_recovery_approval)
    typer.echo(f"{file}: {approval}; signed by {', '.join(signed)}; {NEEDED} people are needed")
