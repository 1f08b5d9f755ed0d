"""The registry's copy of every hospital's privacy ledger."""

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from prometheus_client import Counter

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity, Kind
from services.privacy.chain import CHARGED, RECOVERED, Entry
from services.registry.domain.entities import Event, LedgerReport, LedgerStanding, ReportedLedger
from services.registry.domain.events import event
from services.registry.domain.ledger import continuation
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction

_DIFFERENCES: Final = Counter(
    "fedmesh_registry_ledger_differences_total",
    "Reports of hospitals whose privacy ledger is not the one that they reported before",
)


class LedgerUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

    async def report(self, command: Command[LedgerStanding], report: LedgerReport) -> bytes:
        """Take what is new in a hospital's ledger; a ledger that does not go on from what is here is told to the audit.

        Raises: FedmeshError(PERMISSION_DENIED) for a signature that is not by the hospital's key in the present roster,
            (STATEMENT_INVALID) for entries that are no chain.
        """

        differed = False

        async def body(tx: Transaction) -> LedgerStanding:
            nonlocal differed
            await self._require_signed(tx, report)
            newest, signature = await tx.ledgers.newest(report.hospital_id)
            first = report.entries[0].seq if report.entries else report.head.seq
            known = await tx.ledgers.sha256s(report.hospital_id, min(first, report.head.seq) - 1, newest.seq)
            fresh = continuation(report, newest, known)
            now = self._clock.now()
            differed = fresh is None
            if fresh is None:
                facts = {"kept_seq": newest.seq, "kept_sha256": newest.sha256}
                told = _event("ledger.differs", now, command.caller, report, **facts)
                await tx.outbox.add([told])
                return LedgerStanding(newest, signature, differs=True)
            if fresh:
                await tx.ledgers.add(LedgerReport(report.hospital_id, report.head, report.signature, fresh), now)
                charges = sum(entry.read()["kind"] == CHARGED for entry in fresh)
                told = _event("ledger.reported", now, command.caller, report, entries=len(fresh), charges=charges)
                await tx.outbox.add([told, *_recoveries(fresh, now, command.caller, report)])
                return LedgerStanding(report.head, report.signature, differs=False)
            return LedgerStanding(newest, signature, differs=False)

        answer = await self._mutations.run(command, body)
        _DIFFERENCES.inc(differed)
        return answer

    async def list(
        self, caller: Identity, hospital_id: str, after_seq: int, size: int
    ) -> tuple[tuple[ReportedLedger, ...], tuple[Entry, ...]]:
        """The heads that the caller may see, and entries of one hospital when it is named."""
        if caller.kind is Kind.HOSPITAL and hospital_id not in ("", caller.name):
            raise FedmeshError(Code.PERMISSION_DENIED, "a hospital sees its own ledger only")

        async def body(tx: Transaction) -> tuple[tuple[ReportedLedger, ...], tuple[Entry, ...]]:
            entries = await tx.ledgers.after(hospital_id, after_seq, size) if hospital_id else ()
            return await tx.ledgers.heads(hospital_id), tuple(entries)

        return await self._store.run("ListLedgers", caller, body)

    async def _require_signed(self, tx: Transaction, report: LedgerReport) -> None:
        present = await tx.rosters.present()
        members = present.roster.statement.members if present is not None else ()
        keys = {member.hospital_id: member.signing_key for member in members}
        key = keys.get(report.hospital_id)
        if key is None or not report.head.signed_by(report.hospital_id, key, report.signature):
            raise FedmeshError(
                Code.PERMISSION_DENIED,
                f"the ledger's head is not signed by {report.hospital_id}'s key in the present roster",
            )


def _recoveries(fresh: Sequence[Entry], now: datetime, caller: Identity, report: LedgerReport) -> list[Event]:
    """An event for each time that the ledger was lost and built again, with the signature that vouches for it."""
    told = []
    for entry in fresh:
        said = entry.read()
        if said["kind"] == RECOVERED:
            facts = {name: said[name] for name in ("basis", "epsilon", "delta")}
            signature = report.signature.hex()
            told.append(_event("ledger.recovered", now, caller, report, entry=entry.seq, signature=signature, **facts))
    return told


def _event(kind: str, now: datetime, caller: Identity, report: LedgerReport, **facts: object) -> Event:
    head = report.head
    return event(kind, now, caller, f"hospital/{report.hospital_id}", seq=head.seq, sha256=head.sha256, **facts)
