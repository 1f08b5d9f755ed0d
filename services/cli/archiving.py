"""`fedmesh audit archive`: old parts of the log as files, and out of the database."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services.cli import witnesses
from services.cli.centre import Centre, CentreFile, named_centre, stack_dir
from services.cli.keys import trusted_key
from services.cli.mesh import awake, reach, stub
from services.cli.stack import DEMO_DIR, Folder
from services.common.config import PostgresConfig, load_config
from services.common.errors import Code, FedmeshError
from services.secure_sum.roster import Roster, load_roster_file
from services.transparency.checkpoint import VerifierKey

_MONTHS = 24


@dataclass(frozen=True)
class _Log:
    database: PostgresConfig
    verifier: VerifierKey
    rosters: list[Roster]


def archive(
    out: Annotated[Path, typer.Argument(help="Folder of the archives; each has a folder of its own in it")],
    folder: Folder = DEMO_DIR,
    older_than: Annotated[
        int, typer.Option(min=0, help="Months: partitions with a younger entry are left alone")
    ] = _MONTHS,
    detach: Annotated[
        bool,
        typer.Option("--detach", help="Take partitions out of the database whose archives in DIR are in order"),
    ] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with `dsn` and `password_file` of a database outside a stack; to detach, as audit_migrator"
        ),
    ] = None,
    key: Annotated[Path | None, typer.Option(help="File with the log's public key; else the centre's own")] = None,
    roster: witnesses.RosterFile = None,
    centre: CentreFile = None,
) -> None:
    """Write the log's full and witnessed partitions to archives that `audit verify` checks one by one.

    With --detach nothing is written: partitions that are archived in DIR leave the database, oldest first, each after
    its archive is verified. Keep archives for six years at least, on storage that cannot be rewritten, in two places.
    Outside a stack --config says where the database is, and --centre whose log it is: its registry is then asked for
    the rosters that followed the founding one; with --key and --roster instead nobody is asked.
    """
    from services.audit.archiving import write_archives
    from services.audit.detaching import detach_archives

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True, markup=False)

    role = "audit_migrator" if detach else "audit_service"
    if centre is not None and config is None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT, "--centre says whose log it is; --config where its database is: give both"
        )
    with _outside(config, key, roster, centre) if config else _of_stack(folder, key, roster, role) as log:
        if detach:
            count = detach_archives(log.database, out, log.verifier, log.rosters, say)
            told = "; the audit service tells the log of it (log.archived) within a minute" if count else ""
            say(f"{count} partitions detached{told}.")
            return
        count = asyncio.run(write_archives(log.database, out, log.verifier, log.rosters, older_than, say))
    if not count:
        say("There is nothing to archive.")
        return
    say(
        f"{count} archives of partitions that are still in the database. To take them out: "
        f"fedmesh audit archive {out} --detach"
    )


@contextmanager
def _outside(config: Path, key: Path | None, roster: Path | None, file: Path | None) -> Iterator[_Log]:
    database = load_config(PostgresConfig, config)
    if key is not None and roster is not None and file is None:
        yield _Log(database, trusted_key(key), [load_roster_file(roster)])
        return
    centre = named_centre(file)
    if centre is None:
        raise FedmeshError(
            Code.INVALID_ARGUMENT,
            "--config needs --centre, or --key and --roster: a database does not say whose log it is, nor who witnesses"
            " it",
        )
    verifier = witnesses.log_key(centre) if key is None else trusted_key(key)
    with reach(centre, ("registry",)):
        rosters = asyncio.run(_rosters(centre, roster))
    yield _Log(database, verifier, rosters)


@contextmanager
def _of_stack(folder: Path, key: Path | None, roster: Path | None, role: str) -> Iterator[_Log]:
    with awake(stack_dir(folder), ("audit", "registry")) as stack:
        verifier = witnesses.log_key(stack) if key is None else trusted_key(key)
        yield _Log(stack.postgres.config(role), verifier, asyncio.run(_rosters(stack, roster)))


async def _rosters(centre: Centre, founding: Path | None) -> list[Roster]:
    async with stub(centre, "registry") as registry:
        rosters = await witnesses.known_rosters(centre, registry, founding)
    if not rosters:
        raise FedmeshError(Code.NOT_FOUND, "there is no roster here; name the founding one with --roster")
    return rosters
