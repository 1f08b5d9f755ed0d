"""Takes partitions whose archives are in order out of the database. Needs the rights of the schema's owner, which no
service has."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import errors as pg

from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.postgres import conninfo
from services.secure_sum.roster import Roster
from services.transparency.archive import ArchiveReport, Part, verify_archive
from services.transparency.checkpoint import VerifierKey
from services.transparency.witness import best_witnessed


def detach_archives(
    config: PostgresConfig, folder: Path, verifier: VerifierKey, rosters: Sequence[Roster], say: Callable[[str], None]
) -> int:
    """Detach and drop the oldest partitions, as far as there are archives of them in a folder; how many it were.

    Each archive is verified first, under the log's key and the witnesses' rosters. PostgreSQL compares its root with
    the tree's, and refuses a partition that is younger than `months_online` in audit.partitioning. The audit service
    then tells the log of it.

    Raises: FedmeshError(PROOF_INVALID) for an archive that is damaged, of other entries, or not witnessed,
        (WRONG_STATE) for one that may not go yet, (PERMISSION_DENIED) for a role without the rights,
        (STORE_UNAVAILABLE) when the database is away or the log is in use for too long.
    """
    detached = 0
    try:
        with psycopg.connect(conninfo(config)) as connection:
            while (part := _next(connection)) is not None and (folder / part.folder).exists():
                report = _verified(folder / part.folder, part, verifier, rosters)
                _detach(connection, report)
                detached += 1
                say(f"{part.folder}: is no longer in the database; root {report.root.hex()}")
    except pg.InsufficientPrivilege as error:
        raise FedmeshError(
            Code.PERMISSION_DENIED, "only the owner of the schema may detach: sign in as audit_migrator"
        ) from error
    except pg.ObjectNotInPrerequisiteState as error:
        raise FedmeshError(Code.WRONG_STATE, _primary(error)) from error
    except pg.DataException as error:
        raise FedmeshError(Code.PROOF_INVALID, _primary(error)) from error
    except psycopg.OperationalError as error:
        raise FedmeshError(Code.STORE_UNAVAILABLE, "the database is away, or the log in use: try again") from error
    return detached


def _next(connection: psycopg.Connection[Any]) -> Part | None:
    row = connection.execute(
        "select first_index, level from audit.partitions p"
        " where not exists (select from audit.archives a where a.first_index = p.first_index)"
        " order by first_index limit 1"
    ).fetchone()
    connection.rollback()
    return None if row is None else Part(*row)


def _verified(folder: Path, part: Part, verifier: VerifierKey, rosters: Sequence[Roster]) -> ArchiveReport:
    report = verify_archive(folder, verifier)
    report.require(part)
    counted = best_witnessed(report.note, rosters)
    if not counted.complete:
        raise FedmeshError(
            Code.PROOF_INVALID,
            f"{folder}: its checkpoint is not witnessed: {len(counted.signers)} of {counted.roster.size} hospitals "
            f"cosigned it, {counted.roster.threshold} are needed",
        )
    return report


def _detach(connection: psycopg.Connection[Any], report: ArchiveReport) -> None:
    with connection.transaction():
        connection.execute("set local role audit_owner")
        connection.execute(
            "select audit.detach_partition(%s, %s, %s)", (report.part.first, report.root, report.manifest)
        )


def _primary(error: psycopg.Error) -> str:
    return error.diag.message_primary or "PostgreSQL refuses"
