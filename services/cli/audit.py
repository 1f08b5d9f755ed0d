"""`fedmesh audit`: export the log, verify an export offline, see who witnesses it, check the database."""

from pathlib import Path
from typing import Annotated, Any

import typer
from fedmesh.audit.v1 import audit_pb2
from rich.console import Console
from rich.markup import escape

from services.cli import archiving, receipts, witnesses
from services.cli.centre import Centre, CentreFile, find_place, named_centre, stack_dir
from services.cli.keys import trusted_key
from services.cli.mesh import PATIENCE_S, database_of, reach, stub
from services.cli.stack import DEMO_DIR, DemoDir, Folder
from services.common.config import PostgresConfig, load_config
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call, stream
from services.secure_sum.roster import load_roster_file
from services.transparency.archive import is_archive, read_archives, verify_archive
from services.transparency.checkpoint import VerifierKey, open_checkpoint
from services.transparency.export import CHECKPOINT, ExportWriter
from services.transparency.verify import verify_export
from services.transparency.witness import witnessed as count_witnesses

app = typer.Typer(help="The audit log.", no_args_is_help=True)
witnesses.register(app)
app.command()(receipts.receipt)
app.command()(archiving.archive)


@app.command()
def export(
    out: Annotated[Path, typer.Option("--out", help="New folder for the exported files")],
    folder: DemoDir = None,
    witnessed: Annotated[
        bool, typer.Option("--witnessed", help="Only up to the newest checkpoint that a quorum of hospitals cosigned")
    ] = False,
    roster: witnesses.RosterFile = None,
    archives: Annotated[
        Path | None, typer.Option(help="Folder of the archives, for entries that are in archives alone")
    ] = None,
    centre: CentreFile = None,
) -> None:
    """Write the whole log, its signed checkpoint and its public key to files that `audit verify` checks offline."""
    import asyncio

    console = Console()
    needs = ("audit", "registry") if witnessed else ("audit",)
    with reach(find_place(folder, centre, DEMO_DIR), needs) as found:
        verifier = witnesses.log_key(found)

        async def go() -> int:
            async with stub(found, "audit") as opened:
                if not witnessed:
                    note = (
                        await call(opened.GetCheckpoint, audit_pb2.GetCheckpointRequest(), patience_s=PATIENCE_S)
                    ).checkpoint
                else:
                    note = await _witnessed_note(found, opened, verifier, roster)
                return await stream_export(opened, out, verifier, note, archives)

        with console.status("Exporting the audit log ..."):
            size = asyncio.run(go())
    console.print(f"{size} entries in {out}. Check them with: fedmesh audit verify {out}")


async def _witnessed_note(centre: Centre, audit: Any, verifier: VerifierKey, roster: Path | None) -> str:
    async with stub(centre, "registry") as registry:
        rosters = await witnesses.known_rosters(centre, registry, roster)
    seen = await witnesses.look_at(audit, verifier, rosters)
    if seen.best is None:
        raise FedmeshError(Code.NOT_FOUND, "no checkpoint is witnessed yet: see `fedmesh audit status`")
    return seen.best[0]


async def stream_export(opened: Any, out: Path, verifier: VerifierKey, note: str, archives: Path | None) -> int:
    """Write an export of the log up to a checkpoint, from archives as far as they go and the audit service; its size.

    Raises: FedmeshError(NOT_FOUND) for entries that are in archives alone when these are not given; (PROOF_INVALID) for
        archives that are damaged; as `ExportWriter`.
    """
    size = open_checkpoint(note, verifier).size
    with ExportWriter(out) as writer:
        start = 0
        if archives is not None:
            for index, leaf in read_archives(archives, verifier):
                writer.add(index, leaf)
                start = index + 1
                if start == size:
                    break
        if start < size:
            request = audit_pb2.ListEntriesRequest(start_index=start, limit=size - start)
            async for entry in stream(opened.ListEntries, request, timeout_s=600):
                writer.add(entry.index, entry.leaf)
        writer.finish(note, verifier)
    return size


@app.command()
def verify(
    path: Annotated[
        Path, typer.Argument(help="Folder of an export or of one archive, or file that `audit receipt` wrote")
    ],
    key: Annotated[
        Path | None, typer.Option(help="File with the log's public key from a source you trust; else the export's own")
    ] = None,
    roster: Annotated[
        Path | None,
        typer.Option(help="The founding roster from a source you trust: counts the hospitals that cosigned"),
    ] = None,
) -> None:
    """Check an export, an archive or a receipt with no help from any server. Exit code 1 if anything in it is wrong.

    Of an export or archive: signature, every entry, the tree; with --roster, also that more than two thirds of the
    founding roster's hospitals cosigned the checkpoint. A receipt needs --key and --roster.
    """
    if path.is_file():
        if key is None or roster is None:
            raise FedmeshError(Code.INVALID_ARGUMENT, "a receipt is checked against --key and --roster, give both")
        verified = receipts.verify_file(path, trusted_key(key), roster)
        Console().print(f"[green]OK[/green] {verified.statement}", highlight=False, soft_wrap=True)
        return
    if not path.is_dir():
        raise FedmeshError(Code.NOT_FOUND, f"there is no folder {path}, nor such a file")
    trusted = None if key is None else trusted_key(key)
    report = verify_archive(path, trusted) if is_archive(path) else verify_export(path, trusted)
    Console().print(f"[green]OK[/green] {report.statement}", highlight=False, soft_wrap=True)
    if roster is not None:
        _require_witnesses(path, roster)


def _require_witnesses(directory: Path, roster: Path) -> None:
    counted = count_witnesses((directory / CHECKPOINT).read_text(encoding="utf-8"), load_roster_file(roster))
    needed = (
        f"{len(counted.signers)} of {counted.roster.size} hospitals cosigned it, {counted.roster.threshold} are needed"
    )
    if not counted.complete:
        raise FedmeshError(Code.PROOF_INVALID, f"the checkpoint is not witnessed: {needed}; see `export --witnessed`")
    Console().print(f"[green]OK[/green] The checkpoint is witnessed: {needed}.", highlight=False, soft_wrap=True)


@app.command()
def fsck(
    folder: Folder = DEMO_DIR,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with `dsn` and `password_file` of a database outside a stack")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="File with the log's public key; else the centre's own")] = None,
    archives: Annotated[
        Path | None, typer.Option(help="Folder of the archives, for entries that are in archives alone")
    ] = None,
    centre: CentreFile = None,
) -> None:
    """Derive the whole stored log again from the bodies of its entries, and compare. Exit code 1 if anything differs.

    Needs the database only: the audit service may run, or refuse to. Outside a stack --config says where it is, and
    --centre, or --key, whose log.
    """
    import asyncio

    from services.audit.fsck import check_log

    if config is not None:
        if key is None and (named := named_centre(centre)) is not None:
            key = named.audit_verifier
        if key is None:
            raise FedmeshError(
                Code.INVALID_ARGUMENT, "--config needs --key or --centre: a database does not say whose log it is"
            )
        report = asyncio.run(check_log(load_config(PostgresConfig, config), trusted_key(key), archives))
    elif centre is not None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "--centre says whose log it is; --config where its database is: give both"
        )
    else:
        with database_of(stack_dir(folder)) as (stack, database):
            verifier = witnesses.log_key(stack) if key is None else trusted_key(key)
            report = asyncio.run(check_log(database, verifier, archives))
    console = Console()
    for problem in report.problems:
        console.print(f"[red]wrong[/red] {escape(problem)}", highlight=False, soft_wrap=True)
    for first, last, root in report.unread:
        console.print(
            f"archived: entries {first} to {last} are taken from the hashes of their leaves, under root {root}; "
            "name their archives with --archives",
            highlight=False,
            soft_wrap=True,
        )
    for first in report.untold:
        console.print(
            f"archived: the log does not tell yet of the archive from entry {first} on; the audit service does so "
            "within a minute",
            highlight=False,
            soft_wrap=True,
        )
    counted = (
        f"{report.entries} entries, {report.nodes} subtree hashes, {report.checkpoints} checkpoints, "
        f"{report.cosignatures} cosignatures"
    )
    if report.wrong:
        raise FedmeshError(
            Code.PROOF_INVALID, f"{report.wrong} problems in {counted}: the database was changed by hand"
        )
    also = " and from the hashes of the ranges above" if report.unread else ""
    console.print(f"[green]OK[/green] {counted}: all follow from the bodies{also}.", highlight=False, soft_wrap=True)
