"""Whether what a hospital reports of its privacy ledger goes on from what it reported before."""

import math
from collections.abc import Mapping
from typing import Final

from services.common.errors import Code, FedmeshError
from services.privacy.chain import Entry, Head
from services.registry.domain.entities import LedgerReport

_MOST_ID: Final = 200
_NUMBERS: Final = 2**31


def continuation(report: LedgerReport, newest: Head, known: Mapping[int, str]) -> tuple[Entry, ...] | None:
    """The entries that are new; None when the ledger is an older copy of the one that is known, or another one.

    newest: the head that the registry has. known: SHA-256 of its entries by number, those that the report is about.

    Raises: FedmeshError(STATEMENT_INVALID) for entries that are no chain, leave a gap or do not lead to the head.
    """
    _require_chain(report)
    if report.head.seq < newest.seq or known.get(report.head.seq, report.head.sha256) != report.head.sha256:
        return None
    if any(known.get(entry.seq, entry.sha256) != entry.sha256 for entry in report.entries):
        return None
    fresh = tuple(entry for entry in report.entries if entry.seq > newest.seq)
    if not fresh:
        return ()
    if fresh[0].seq != newest.seq + 1:
        raise FedmeshError(
            Code.STATEMENT_INVALID, f"the report begins with entry {fresh[0].seq}, {newest.seq + 1} comes next"
        )
    return fresh if fresh[0].follows(newest) else None


def _require_chain(report: LedgerReport) -> None:
    for before, entry in zip(report.entries, report.entries[1:], strict=False):
        if not entry.follows(before.head):
            raise FedmeshError(Code.STATEMENT_INVALID, f"entry {entry.seq} does not follow from the one before")
    if report.entries and report.entries[-1].head != report.head:
        raise FedmeshError(Code.STATEMENT_INVALID, "the entries do not lead to the head")
    for entry in report.entries:
        try:
            said = entry.read()
            numbers = [said.get("round", 1), said.get("attempt", 1)]
            texts = [said.get("job_id", ""), said.get("basis", "")]
            if not all(text.isprintable() and len(text) <= _MOST_ID for text in texts):
                raise ValueError("a text in it is too long, or not printable")
            amounts = [said.get("epsilon", 0.0), said.get("delta", 0.0)]
            if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
                raise ValueError("amounts are finite and not negative")
            if not all(1 <= number < _NUMBERS for number in numbers):
                raise ValueError("round and attempt are counted from 1")
        except ValueError as error:
            raise FedmeshError(Code.STATEMENT_INVALID, f"entry {entry.seq}: {error}") from error
