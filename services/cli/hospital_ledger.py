"""`fedmesh hospital reconcile` and `recover-ledger`: the privacy ledger against what was reported of it."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from services.common.errors import Code, FedmeshError

if TYPE_CHECKING:
    from services.hospital_node.recovery import Outlook

_RUNBOOK = "docs/runbooks/LedgerLost.md"


def register(app: typer.Typer) -> None:
    """Add the commands to `fedmesh hospital`."""
    app.command()(reconcile)
    app.command("recover-ledger")(recover_ledger)


def reconcile(
    config: Annotated[Path, typer.Option(help="The hospital node's configuration; the node may run")],
) -> None:
    """Compare this hospital's own ledger with what it reported to the registry. Exit code 1 for a difference.

    Asked by the hospital's own certificate. Nothing is changed.
    """
    from fedmesh.registry.v1 import registry_pb2_grpc

    from services.cli.reconciliation import ReportedLedgers, compare_ledgers, print_verdicts, reported_ledgers
    from services.common.config import load_config
    from services.common.grpc.client import MeshChannel
    from services.hospital_node.config import HospitalConfig

    settings = load_config(HospitalConfig, config)

    async def ask() -> ReportedLedgers:
        async with MeshChannel(settings.registry.target, settings.tls) as channel:
            return await reported_ledgers(channel.stub(registry_pb2_grpc.RegistryServiceStub))

    reported = asyncio.run(ask())
    if not print_verdicts(compare_ledgers({settings.hospital_id: settings.data_dir}, reported)):
        raise typer.Exit(1)


def recover_ledger(
    config: Annotated[Path, typer.Option(help="The hospital node's configuration; the node must not run")],
    log: Annotated[
        Path | None, typer.Option(help="Folder of `fedmesh audit export --witnessed`: shows that the copy is whole")
    ] = None,
    approval: Annotated[
        Path | None, typer.Option(help="File of `fedmesh privacy approve-recovery`, signed by two of privacy.approvers")
    ] = None,
    write: Annotated[bool, typer.Option("--write", help="Do it; without, only look")] = False,
    all_spent: Annotated[
        bool, typer.Option("--all-spent", help="With --write: let everything count as spent for 365 days")
    ] = False,
) -> None:
    """Rebuild a lost privacy ledger from what this hospital had reported to the registry. Only looks without --write.

    First look for a newer copy of the node's folder: this is for the case that there is none. Jobs from before go no
    further, and what was reported of them counts in full from now on. What may have been spent and not reported counts
    as everything, unless the ledger's second file survived, or two people say how much it was at most; both need --log.
    """
    from services.common.clock import SystemClock
    from services.common.config import load_config
    from services.hospital_node.config import HospitalConfig
    from services.hospital_node.recovery import Evidence, recover_ledger

    if all_spent and not write:
        raise FedmeshError(Code.INVALID_ARGUMENT, "--all-spent says what --write may do: give both")
    settings = load_config(HospitalConfig, config)
    evidence = Evidence(log, approval, all_spent)
    seen = asyncio.run(recover_ledger(settings, evidence, SystemClock(), write=write))
    _show(seen, settings.hospital_id)
    if seen.done is None:
        typer.echo(f"Nothing was changed. How to go on: {_RUNBOOK}")
        return
    last = seen.done
    typer.echo(f"The ledger is in {settings.data_dir}, and the registry has its entry {last.seq} ({last.sha256[:16]}).")
    typer.echo("Start the node. The audit log gets the event `ledger.recovered`.")


def _show(look: "Outlook", hospital_id: str) -> None:
    from services.cli.reconciliation import rows_of
    from services.cli.tables import make_table

    console = Console()
    head = look.reported.head
    console.print(f"{hospital_id} reported {head.seq} entries of its ledger; the newest is", highlight=False)
    console.print(f"  --seq {head.seq} --sha256 {head.sha256}", highlight=False, soft_wrap=True)
    table = make_table("population", "job", "epsilon", "delta", "charged", "reported")
    for row in rows_of(look.reported.entries):
        state = "released" if row.released else f"{row.reserved_at:%Y-%m-%d %H:%M}"
        charged = f"{row.charged}/{row.compositions}"
        table.add_row(row.population, row.job_id[:8], f"{row.epsilon:g}", f"{row.delta:g}", charged, state)
    console.print(table)
    if look.reported.uncharged:
        console.print(f"[red]{look.reported.uncharged} contributions to private rounds have no reported charge[/red]")
    if look.witnessed is not None:
        seen, at = look.witnessed, datetime.fromtimestamp(look.witnessed.since, UTC)
        console.print(
            f"The log that {len(seen.signers)} hospitals witnessed at {at:%Y-%m-%d %H:%M} UTC tells of the same entry:"
            " what was reported before then is all here.",
            highlight=False,
        )
    if look.kept.seq > head.seq:
        console.print(
            f"[red]The ledger's second file names entry {look.kept.seq}: {look.kept.seq - head.seq} entries were never"
            " reported[/red]",
            highlight=False,
        )
    recovery = look.recovery
    console.print(
        f"Not reported, and counted as spent for 365 days: epsilon {recovery.epsilon:g}, delta {recovery.delta:g}"
        f" ({recovery.basis.value})",
        highlight=False,
    )
