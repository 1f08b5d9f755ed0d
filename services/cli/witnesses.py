"""`fedmesh audit status` and `evidence`: how far the log is witnessed, who lags, who raised an alarm, with what."""

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from fedmesh.audit.v1 import audit_pb2
from fedmesh.registry.v1 import registry_pb2
from rich.console import Console
from rich.markup import escape

from services.cli.centre import Centre, CentreFile, find_place, stack_dir
from services.cli.keys import trusted_key
from services.cli.mesh import PATIENCE_S, reach, stub
from services.cli.stack import DEMO_DIR, DemoDir, Folder
from services.cli.tables import make_table
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.hospital_node.store.witness import read_witness
from services.secure_sum.roster import Roster, load_roster_file
from services.transparency.checkpoint import Checkpoint, VerifierKey, open_checkpoint
from services.transparency.merkle import verify_consistency
from services.transparency.witness import Witnessed, best_witnessed, follow, witnessed

_PAGE: Final = 100
_PAGES: Final = 10
_ALARM_EXIT: Final = 3
RosterFile = Annotated[
    Path | None, typer.Option("--roster", help="The founding roster from a source you trust; else the centre's own")
]


@dataclass
class Seen:
    """What the audit service shows of its witnesses, verified here. last: by hospital, size and time of its newest
    cosignature."""

    newest: Checkpoint
    best: tuple[str, Checkpoint, Witnessed] | None = None
    last: dict[str, tuple[int, int]] = field(default_factory=dict)


def register(app: typer.Typer) -> None:
    """Add the commands to `fedmesh audit`."""
    app.command()(status)
    app.command()(evidence)


def status(folder: DemoDir = None, roster: RosterFile = None, centre: CentreFile = None) -> None:
    """Say how much of the log is witnessed, who lags, and who raised an alarm. Exit code 3 while an alarm stands.

    An alarm stands until the hospital that raised it cosigns again; it stays on record for good.
    Signatures and proofs are checked here, against the log's public key and the roster; the service is not believed.
    """
    with reach(find_place(folder, centre, DEMO_DIR), ("audit", "registry")) as opened:
        verifier, rosters, seen, alarms = asyncio.run(_ask(opened, roster))
    console = Console()
    console.print(f"log        {verifier}\nsize       {seen.newest.size} entries", highlight=False, soft_wrap=True)
    console.print(_summary(seen, rosters), highlight=False, soft_wrap=True)
    if rosters:
        _print_hospitals(console, seen, rosters[-1])
    if not alarms.total:
        console.print("alarms     none", highlight=False)
    elif _print_alarms(console, alarms, seen):
        raise typer.Exit(_ALARM_EXIT)


async def _ask(centre: Centre, roster: Path | None) -> tuple[VerifierKey, list[Roster], Seen, Any]:
    verifier = log_key(centre)
    async with stub(centre, "audit") as audit, stub(centre, "registry") as registry:
        rosters = await known_rosters(centre, registry, roster)
        seen = await look_at(audit, verifier, rosters)
        return verifier, rosters, seen, await call(audit.ListAlarms, audit_pb2.ListAlarmsRequest(limit=_PAGE))


def log_key(centre: Centre) -> VerifierKey:
    """The public key of a centre's audit log.

    Raises: FedmeshError(CONFIG_INVALID) when it is not named, (INVALID_ARGUMENT) when its file holds none.
    """
    return trusted_key(centre.audit_verifier)


async def known_rosters(centre: Centre, registry: Any, founding: Path | None) -> list[Roster]:
    """The rosters that follow from the founding one, oldest first; none when no founding one is known.

    Raises: FedmeshError for a founding roster that is not in order, or successors that do not follow.
    """
    path = founding or centre.roster_file
    if path is None or (founding is None and not path.exists()):
        return []
    first = load_roster_file(path)
    answer = await call(registry.ListRosters, registry_pb2.ListRostersRequest(after_version=1))
    signed = [(item.statement, {one.hospital_id: one.signature for one in item.signatures}) for item in answer.rosters]
    return follow(first, signed)


async def look_at(audit: Any, verifier: VerifierKey, rosters: list[Roster]) -> Seen:
    """Read the newest checkpoint and the cosigned ones back to the newest that a quorum witnessed.

    Raises: FedmeshError(PROOF_INVALID) for a wrong signature, or a newest checkpoint that does not extend that one.
    """
    newest = (await call(audit.GetCheckpoint, audit_pb2.GetCheckpointRequest(), patience_s=PATIENCE_S)).checkpoint
    seen = Seen(open_checkpoint(newest, verifier))
    before = 0
    for _ in range(_PAGES if rosters else 0):
        request = audit_pb2.ListCosignedCheckpointsRequest(before_size=before, limit=_PAGE)
        page = (await call(audit.ListCosignedCheckpoints, request)).checkpoints
        for item in page:
            _count(seen, item.checkpoint, verifier, rosters)
        if len(page) < _PAGE or (seen.best and len(seen.last) == rosters[-1].size):
            break
        before = page[-1].size
    if seen.best is not None:
        await _require_extension(audit, seen.best[1], seen.newest)
    return seen


def _count(seen: Seen, note: str, verifier: VerifierKey, rosters: list[Roster]) -> None:
    checkpoint = open_checkpoint(note, verifier)
    for name, timestamp in witnessed(note, rosters[-1]).signers.items():
        seen.last.setdefault(name, (checkpoint.size, timestamp))
    if seen.best is None:
        best = best_witnessed(note, rosters)
        if best.complete:
            seen.best = (note, checkpoint, best)


async def _require_extension(audit: Any, first: Checkpoint, second: Checkpoint) -> None:
    if second.size < first.size:
        raise FedmeshError(
            Code.PROOF_INVALID,
            f"the log has {second.size} entries, but {first.size} were witnessed: it was rolled back",
        )
    request = audit_pb2.GetConsistencyProofRequest(first_size=first.size, second_size=second.size)
    proof = await call(audit.GetConsistencyProof, request)
    verify_consistency(first.size, second.size, first.root, second.root, list(proof.hashes))


def _summary(seen: Seen, rosters: list[Roster]) -> str:
    if not rosters:
        return "witnessed  unknown: there is no roster here; name the founding one with --roster"
    if seen.best is None:
        return f"witnessed  [red]nothing yet[/red]: {rosters[-1].threshold} of {rosters[-1].size} hospitals are needed"
    _, checkpoint, best = seen.best
    return (
        f"witnessed  {checkpoint.size} entries, by {len(best.signers)} of {best.roster.size} hospitals "
        f"({best.roster.threshold} needed), {_age(best.since)} ago; the newest checkpoint is proven to extend them"
    )


def _print_hospitals(console: Console, seen: Seen, roster: Roster) -> None:
    table = make_table("hospital", "cosigned", "behind", "ago")
    for name in roster.ids:
        size, timestamp = seen.last.get(name, (0, 0))
        behind = seen.newest.size - size
        cells = (str(size), str(behind) if behind else "", _age(timestamp)) if size else ("never", str(behind), "")
        table.add_row(name, *cells)
    console.print(table)


def _print_alarms(console: Console, alarms: Any, seen: Seen) -> bool:
    """Whether an alarm stands; those that are not shown are taken to."""
    console.print(f"alarms     [red]{alarms.total}[/red], newest first; both checkpoints: fedmesh audit evidence")
    table = make_table("stands", "hospital", "alarm", "when (UTC)", "held", "seen", "reason")
    any_stands = bool(alarms.total > len(alarms.alarms))
    for alarm in alarms.alarms:
        _, cosigned_at = seen.last.get(alarm.hospital_id, (0, 0))
        stands = bool(cosigned_at <= alarm.recorded_at.seconds)
        any_stands |= stands
        table.add_row(
            "[red]yes[/red]" if stands else "no",
            alarm.hospital_id,
            audit_pb2.AlarmKind.Name(alarm.kind).removeprefix("ALARM_KIND_").lower(),
            alarm.recorded_at.ToDatetime().isoformat(" ", "seconds"),
            _size_of(alarm.held_checkpoint),
            _size_of(alarm.seen_checkpoint),
            escape(alarm.reason),
        )
    console.print(table)
    return any_stands


def _size_of(note: str) -> str:
    lines = note.split("\n")
    return escape(lines[1][:20]) if len(lines) > 1 else ""


def _age(timestamp: int) -> str:
    seconds = max(0, int(time.time()) - timestamp)
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length} {unit}"
    return f"{seconds} s"


def evidence(
    folder: Folder = DEMO_DIR,
    data_dir: Annotated[
        Path | None, typer.Option("--data-dir", help="One hospital node's `data_dir`, instead of a stack's hospitals")
    ] = None,
) -> None:
    """Show what hospitals hold of the log and what they refused to cosign, from their own disks: no service is asked.

    Exit code 3 when there is evidence. A refused checkpoint stays on record when the log is put right.
    """
    homes = [data_dir] if data_dir else sorted(p for p in (stack_dir(folder) / "hospitals").glob("*") if p.is_dir())
    if not homes:
        raise FedmeshError(Code.NOT_FOUND, f"no hospital has witnessed anything in {folder}")
    found = 0
    for home in homes:
        held, refusals = read_witness(home)
        for item in held.values():
            typer.echo(f"{home.name}: holds {item.size} entries{', cosigned' if item.cosigned else ''}")
        for refusal in refusals:
            found += 1
            typer.echo(f"{home.name}: refused at {refusal.at.isoformat(' ', 'seconds')}: {refusal.kind.value}")
            typer.echo(
                f"reason: {refusal.reason}\n--- held\n{refusal.held or '(nothing)'}\n--- refused\n{refusal.seen}"
            )
    if found:
        raise typer.Exit(_ALARM_EXIT)
    typer.echo("nothing was refused")
