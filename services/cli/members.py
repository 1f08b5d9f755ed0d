"""`fedmesh hospitals`, `roster show`, `epochs`: who takes part, in which standing, with which keys."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer
from fedmesh.coordinator.v1 import coordinator_pb2
from fedmesh.registry.v1 import budget_pb2, registry_pb2
from rich.console import Console
from rich.markup import escape

from services.cli import roster
from services.cli.centre import Centre, CentreFile, find_place
from services.cli.inspection import Limit
from services.cli.mesh import PATIENCE_S, ask, or_why, reach, stub
from services.cli.stack import DEMO_DIR, DemoDir
from services.cli.tables import make_table
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.embedded.stack import Stack
from services.secure_sum.roster import as_roster
from services.secure_sum.statements import EpochStatement, parse

_NEEDS: Final = ("audit", "registry")
_CERTIFICATE: Final = "certificate until (UTC)"


def register(app: typer.Typer) -> None:
    """Add the commands to the main command."""
    app.command()(hospitals)
    app.command()(epochs)


def hospitals(folder: DemoDir = None, centre: CentreFile = None) -> None:
    """List hospitals: standing, strikes that count now, whether they are connected, what is left of their budget."""
    with reach(find_place(folder, centre, DEMO_DIR), _NEEDS) as opened:
        seen = asyncio.run(_look(opened))
    table = make_table(
        "hospital", "standing", "strikes", "connected (UTC)", "epsilon left", _CERTIFICATE, "display name"
    )
    # Of all that may be folded to fit a terminal, this is what people search and copy.
    table.columns[0].no_wrap = True
    for found in seen.hospitals:
        table.add_row(
            found.hospital_id,
            registry_pb2.HospitalStatus.Name(found.status).removeprefix("HOSPITAL_STATUS_").lower(),
            str(found.strikes or ""),
            "?" if seen.connected is None else seen.connected.get(found.hospital_id, "no"),
            seen.left(found.hospital_id),
            _until(found),
            "" if found.display_name == found.hospital_id else found.display_name,
        )
    console = Console()
    console.print(table)
    if not seen.hospitals:
        console.print("No hospital is registered here yet: fedmesh members register --help")
    console.print(f"[dim]{seen.legend()}[/dim]", highlight=False)
    for note in seen.notes:
        console.print(f"[yellow]{escape(note)}[/yellow]", highlight=False)


@dataclass
class _Seen:
    """Hospitals and what else could be asked of them. notes: what could not, and why.

    connected: since when, by hospital; budgets: what is left. None for what could not be asked.
    """

    hospitals: Sequence[registry_pb2.Hospital]
    connected: dict[str, str] | None
    budgets: budget_pb2.ListBudgetsResponse | None
    notes: tuple[str, ...]

    def left(self, hospital_id: str) -> str:
        if self.budgets is None:
            return "?"
        left = {item.hospital_id: item.epsilon_left for item in self.budgets.budgets}
        return f"{left.get(hospital_id, self.budgets.epsilon_limit):g}"

    def legend(self) -> str:
        of = "" if self.budgets is None else f"of {self.budgets.epsilon_limit:g} in 365 days, "
        return (
            "connected: since when the hospital's task stream is open. epsilon left: "
            f"{of}by what the hospital reported; its own ledger decides. ?: could not be asked."
        )


async def _look(centre: Centre) -> _Seen:
    """The hospitals, what they have left, and who is connected."""
    async with stub(centre, "registry") as registry:
        listed = await call(registry.ListHospitals, registry_pb2.ListHospitalsRequest())
    if isinstance(centre, Stack) and not any(part.name == "coordinator" and part.running for part in centre.status()):
        connected, unseen = None, "the coordinator does not run"
    else:
        connected, unseen = await or_why(_connected(centre))
    budgets, unread = await or_why(_budgets(centre))
    told = (("who is connected", unseen), ("epsilon left", unread))
    return _Seen(listed.hospitals, connected, budgets, tuple(f"{what}: {why}" for what, why in told if why))


async def _connected(centre: Centre) -> dict[str, str]:
    """Since when hospitals are connected."""
    async with stub(centre, "coordinator") as coordinator:
        answer = await call(coordinator.ListParticipants, coordinator_pb2.ListParticipantsRequest())
    return {item.hospital_id: f"{item.connected_at.ToDatetime():%Y-%m-%d %H:%M}" for item in answer.participants}


async def _budgets(centre: Centre) -> budget_pb2.ListBudgetsResponse:
    """What hospitals have left. A registry that has just started reads their ledgers first."""
    async with stub(centre, "budgets") as budgets:
        answer: budget_pb2.ListBudgetsResponse = await call(
            budgets.ListBudgets, budget_pb2.ListBudgetsRequest(), patience_s=PATIENCE_S
        )
    return answer


def _until(found: registry_pb2.Hospital) -> str:
    """When the newest certificate that the registry gave a hospital ends, and whether that still counts."""
    if not found.HasField("certificate_not_after"):
        return ""
    ends = found.certificate_not_after.ToDatetime(tzinfo=UTC)
    over = " [red]over[/red]" if ends <= datetime.now(UTC) else ""
    return f"{ends:%Y-%m-%d %H:%M}{over}"


@roster.app.command()
def show(
    folder: DemoDir = None,
    version: Annotated[int, typer.Option(min=0, help="Version; the present one by default")] = 0,
    centre: CentreFile = None,
) -> None:
    """Show a roster: its members, their keys, and who signed it."""

    async def read(registry: Any) -> Any:
        asked = registry_pb2.ListRostersRequest(after_version=max(0, version - 1))
        return (await call(registry.ListRosters, asked)).rosters

    listed = ask(find_place(folder, centre, DEMO_DIR), "registry", read, _NEEDS)
    if not listed:
        what = f"there is no roster of version {version}" if version else "there is no roster yet"
        raise FedmeshError(Code.NOT_FOUND, f"{what}: it is published once hospitals have signed it")
    chosen = listed[0] if version else listed[-1]
    signed_by = {item.hospital_id for item in chosen.signatures}
    roster = as_roster(chosen.statement)
    console = Console()
    console.print(f"\nroster version {roster.statement.version} of {roster.statement.consortium}", soft_wrap=True)
    console.print(f"SHA-256 {roster.sha256}, after {roster.statement.previous or 'none'}", soft_wrap=True)
    numbers = f"{roster.size} members, threshold {roster.threshold}, at most {roster.colluders} colluders"
    console.print(f"{numbers}; {len(signed_by)} signatures")
    table = make_table("hospital", "signed", "signing key (Ed25519)", "sealing key (X25519)")
    for member in roster.statement.members:
        signed = "yes" if member.hospital_id in signed_by else ""
        table.add_row(member.hospital_id, signed, member.signing_key[:16], member.sealing_key[:16])
    console.print(table)


def epochs(folder: DemoDir = None, limit: Limit = 20, centre: CentreFile = None) -> None:
    """List the key epochs of the present roster, newest first, and say when one is due."""

    async def read(registry: Any) -> Any:
        newest = await call(registry.GetEpoch, registry_pb2.GetEpochRequest())
        found = [parse(EpochStatement, newest.epoch.statement)] if newest.HasField("epoch") else []
        while found and found[-1].epoch > 1 and len(found) < limit:
            asked = registry_pb2.GetEpochRequest(roster_sha256=newest.roster_sha256, epoch=found[-1].epoch - 1)
            found.append(parse(EpochStatement, (await call(registry.GetEpoch, asked)).epoch.statement))
        return newest, found

    newest, found = ask(find_place(folder, centre, DEMO_DIR), "registry", read, _NEEDS)
    table = make_table("epoch", "maker", "parameter set", "public key", "keys (SHA-256)")
    for epoch in found:
        public = "no" if epoch.public_key is None else "yes"
        table.add_row(str(epoch.epoch), epoch.maker, epoch.parameter_set, public, epoch.key_sha256[:16])
    console = Console()
    console.print(table)
    if not newest.roster_sha256:
        console.print("There is no roster yet, so no keys either.")
    elif newest.due:
        console.print(f"Epoch {newest.due} has been due for {newest.due_for_s:.0f} s: a hospital node makes it.")
