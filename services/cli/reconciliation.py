"""The registry's copies of privacy ledgers, and how they compare with the hospitals' own."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from fedmesh.registry.v1 import registry_pb2
from rich.console import Console

from services.cli.tables import make_table
from services.common.grpc.client import call
from services.hospital_node.store.ledger import LEDGER_FILE, LedgerRow, read_entries
from services.privacy.chain import CHARGED, RECOVERED, RESERVED, Entry, Head
from services.secure_sum.roster import as_roster


@dataclass(frozen=True)
class Reported:
    """What the registry has of one hospital. signed: its newest entry carries the signature of a key of the hospital's,
    its present one or, until it reports again, one that it had before."""

    hospital_id: str
    entries: tuple[Entry, ...]
    signed: bool
    uncharged: int


@dataclass(frozen=True)
class ReportedLedgers:
    ledgers: tuple[Reported, ...]


@dataclass(frozen=True)
class Verdict:
    """How a hospital's own ledger and the registry's copy compare; own, reported: numbers of entries.

    own: None where the hospital's own ledger is not at hand.
    """

    hospital_id: str
    own: int | None
    reported: int
    signed: bool
    uncharged: int
    agrees: bool
    text: str


async def reported_ledgers(registry: Any) -> ReportedLedgers:
    """Everything that the registry has and shows: to an operator all of it, to a hospital its own."""
    rosters = (await call(registry.ListRosters, registry_pb2.ListRostersRequest())).rosters
    keys: dict[str, set[str]] = defaultdict(set)
    for roster in rosters:
        for member in as_roster(roster.statement).statement.members:
            keys[member.hospital_id].add(member.signing_key)
    heads = (await call(registry.ListLedgers, registry_pb2.ListLedgersRequest())).ledgers
    return ReportedLedgers(
        tuple(
            [
                Reported(
                    found.hospital_id,
                    await _entries(registry, found.hospital_id),
                    Head(found.head.seq, found.head.sha256).signer(
                        found.hospital_id, keys[found.hospital_id], found.head.signature
                    )
                    is not None,
                    found.uncharged,
                )
                for found in heads
            ]
        )
    )


async def _entries(registry: Any, hospital_id: str) -> tuple[Entry, ...]:
    entries: list[Entry] = []
    while True:
        request = registry_pb2.ListLedgersRequest(hospital_id=hospital_id, after_seq=len(entries))
        page = (await call(registry.ListLedgers, request)).entries
        if not page:
            return tuple(entries)
        entries += [Entry(item.seq, item.body, item.sha256) for item in page]


def compare_ledgers(homes: Mapping[str, Path], reported: ReportedLedgers) -> list[Verdict]:
    """One verdict a hospital. homes: the data folders of nodes by hospital."""
    known = {ledger.hospital_id: ledger for ledger in reported.ledgers}
    verdicts = []
    for hospital_id in sorted({*homes, *known}):
        ledger = known.get(hospital_id, Reported(hospital_id, (), signed=False, uncharged=0))
        home = homes.get(hospital_id)
        own = read_entries(home) if home is not None and (home / LEDGER_FILE).is_file() else []
        agrees, text = _compare(own, ledger)
        verdicts.append(
            Verdict(hospital_id, len(own), len(ledger.entries), ledger.signed, ledger.uncharged, agrees, text)
        )
    return verdicts


def check_copies(reported: ReportedLedgers) -> list[Verdict]:
    """One verdict a hospital on the registry's copies by themselves, without the hospitals' own ledgers."""
    return [
        Verdict(item.hospital_id, None, len(item.entries), item.signed, item.uncharged, *_check_copy(item))
        for item in reported.ledgers
    ]


def _check_copy(ledger: Reported) -> tuple[bool, str]:
    if not _is_signed_chain(ledger):
        return False, "the registry's copy is not what the hospital signed"
    if ledger.uncharged:
        # Of a round under way the charge may be about to be reported.
        return False, "contributions without a reported charge: look again, then ask the hospital"
    return True, "whole and signed; the hospital's own ledger is not here"


def _is_signed_chain(ledger: Reported) -> bool:
    return _is_chain(ledger.entries) and (ledger.signed or not ledger.entries)


def _compare(own: Sequence[Entry], ledger: Reported) -> tuple[bool, str]:
    reported = ledger.entries
    if not _is_signed_chain(ledger):
        return False, "the registry's copy is not what the hospital signed"
    if any(mine != theirs for mine, theirs in zip(own, reported, strict=False)):
        return False, "another history than the registry's"
    if len(own) < len(reported):
        return False, "older than the registry's copy"
    later = own[len(reported) :]
    # A charge may be on its way while its contribution is counted already.
    if ledger.uncharged > sum(entry.read()["kind"] == CHARGED for entry in later):
        return False, "contributions without a charge"
    return True, f"{len(later)} not reported yet" if later else "equal"


def _is_chain(entries: Sequence[Entry]) -> bool:
    heads = [Head(), *(entry.head for entry in entries)]
    return all(entry.follows(before) for before, entry in zip(heads, entries, strict=False))


def rows_of(entries: Sequence[Entry]) -> list[LedgerRow]:
    """The jobs that entries speak of, as the hospital's own ledger lists them."""
    rows: dict[str, LedgerRow] = {}
    for entry in entries:
        said = entry.read()
        at = datetime.fromisoformat(said["at"])
        if said["kind"] == RECOVERED:
            rows = {job_id: replace(row, recovered_at=at) for job_id, row in rows.items()}
            continue
        job_id = said["job_id"]
        if said["kind"] == RESERVED:
            rows[job_id] = LedgerRow(
                job_id=job_id,
                plan_id=said["plan_id"],
                population=said["population"],
                private=bool(said["private"]),
                epsilon=said["epsilon"],
                delta=said["delta"],
                colluders=said["colluders"],
                compositions=said["compositions"],
                charged=0,
                reserved_at=at,
                last_charged_at=None,
                released=False,
            )
        elif said["kind"] == CHARGED:
            rows[job_id] = replace(rows[job_id], charged=rows[job_id].charged + 1, last_charged_at=at)
        else:
            rows[job_id] = replace(rows[job_id], released=True)
    return list(rows.values())


def print_verdicts(verdicts: Sequence[Verdict]) -> bool:
    """A table of how ledgers compare. Returns whether all is well."""
    table = make_table("hospital", "own entries", "registry's", "signed", "uncharged", "verdict")
    for verdict in verdicts:
        colour = "green" if verdict.agrees else "red"
        table.add_row(
            verdict.hospital_id,
            "" if verdict.own is None else str(verdict.own),
            str(verdict.reported),
            "yes" if verdict.signed else "no",
            str(verdict.uncharged),
            f"[{colour}]{verdict.text}[/{colour}]",
        )
    console = Console()
    console.print(table)
    console.print(
        "[dim]signed: the registry's newest entry carries the hospital's signature. uncharged: contributions to "
        "private rounds for which no charge was reported.[/dim]"
    )
    return all(verdict.agrees for verdict in verdicts)
