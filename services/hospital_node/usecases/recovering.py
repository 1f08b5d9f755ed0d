"""Rebuilding a privacy ledger that was lost for good, from what this hospital had reported of it.

The registry's copy counts as far as this hospital signed it, and the audit log, which other hospitals witnessed, says
whether it is whole. What was spent and never reported is in neither: see `services.privacy.recovery`.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.recovery_ports import LedgerCopy, LostLedger
from services.privacy.chain import Entry, Head
from services.privacy.recovery import ALL_SPENT, NOTHING_UNREPORTED, Basis, Recovery
from services.secure_sum.roster import MemberKeys

_TOLD: Final = ("ledger.reported", "ledger.recovered")


@dataclass(frozen=True)
class Reported:
    """What this hospital reported, as it signed it. uncharged: contributions for which it reported no charge."""

    head: Head
    entries: tuple[Entry, ...]
    uncharged: int


async def read_copy(copy: LedgerCopy, hospital_id: str, signing_keys: Collection[str]) -> Reported:
    """The registry's copy, checked. signing_keys: the hospital's present and former ones, 64 hex digits each.

    Raises: FedmeshError(PROOF_INVALID) for a copy that is not what the hospital signed; errors of the registry.
    """
    standing, uncharged = await copy.head()
    head = standing.head
    if head.seq and head.signer(hospital_id, signing_keys, standing.signature) is None:
        raise _invalid(f"its newest entry {head.seq} is not signed by {hospital_id}")
    entries: list[Entry] = []
    while len(entries) < head.seq:
        page = await copy.entries_after(len(entries))
        if not page:
            raise _invalid(f"it ends with entry {len(entries)}, and {hospital_id} signed entry {head.seq}")
        for entry in page:
            before = entries[-1].head if entries else Head()
            if not entry.follows(before):
                raise _invalid(f"entry {entry.seq} does not follow from the one before")
            entries.append(entry)
    if entries and entries[head.seq - 1].head != head:
        raise _invalid(f"entry {head.seq} is not the one that {hospital_id} signed")
    return Reported(head, tuple(entries[: head.seq]), uncharged)


def newest_told(leaves: Iterable[dict[str, Any]], hospital_id: str) -> Head:
    """The newest head of a hospital's ledger that entries of the audit log name; the empty one for none."""
    newest = Head()
    for leaf in leaves:
        if leaf["type"] in _TOLD and leaf["subject"] == f"hospital/{hospital_id}":
            told = Head(int(leaf["body"]["seq"]), str(leaf["body"]["sha256"]))
            newest = max(newest, told, key=lambda head: head.seq)
    return newest


def require_whole(reported: Reported, logged: Head) -> None:
    """Check the registry's copy against the audit log.

    Raises: FedmeshError(PROOF_INVALID) for a copy that is cut or another one, (WRONG_STATE) for a log from before it.
    """
    if logged.seq > reported.head.seq:
        raise _invalid(f"it ends with entry {reported.head.seq}, and the audit log tells of entry {logged.seq}")
    if logged.seq and reported.entries[logged.seq - 1].head != logged:
        raise _invalid(f"its entry {logged.seq} is not the one that the audit log tells of")
    if logged != reported.head:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the exported log tells of this hospital's ledger up to entry {logged.seq} only, and entry"
            f" {reported.head.seq} was reported: export the log again, once it is witnessed",
        )


def what_is_unknown(reported: Reported, kept: Head, logged: Head | None, approved: Recovery | None) -> Recovery:
    """What counts as spent beyond what was reported.

    kept: the head in the ledger's second file. logged: what the witnessed log tells of, None without one.

    Raises: FedmeshError(PROOF_INVALID, WRONG_STATE) as `require_whole`, or when the second file and the copy are of two
        ledgers; (CONFIG_INVALID) for an approval that nothing backs.
    """
    if logged is not None:
        require_whole(reported, logged)
    if 0 < kept.seq <= reported.head.seq and reported.entries[kept.seq - 1].head != kept:
        raise _invalid(f"its entry {kept.seq} is not the one that this hospital's second file names")
    if approved is None:
        known = logged is not None and kept == reported.head and kept.seq > 0
        return NOTHING_UNREPORTED if known else ALL_SPENT
    if logged is None:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            "an approval counts together with the witnessed audit log only (--log): without it nobody knows whether the"
            " registry's copy is whole",
        )
    return approved


async def recover(
    place: LostLedger, copy: LedgerCopy, keys: MemberKeys, reported: Reported, recovery: Recovery, now: datetime
) -> Entry:
    """Build the ledger, tell the registry, put it into its place; the entry of the recovery. Nothing is in place before
    the registry has taken that entry: of two nodes that go on from one copy it takes one.

    Raises: FedmeshError(WRONG_STATE) when there is a ledger, or the registry's copy has changed meanwhile.
    """
    place.require_lost()
    last = place.build(reported.entries, recovery, now)
    standing = await copy.report(last.head, keys.signing.sign(last.head.to_sign(keys.hospital_id)), [last])
    if standing.differs or standing.head != last.head:
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the registry has entry {standing.head.seq} of this hospital by now, from another node: nothing was"
            " changed here. Find that node: it has the ledger",
        )
    place.install()
    return last


def finish(place: LostLedger, reported: Reported, *, write: bool) -> Entry | None:
    """Put a ledger into its place that the registry was told of before this was interrupted; None when there is none.

    Raises: FedmeshError(WRONG_STATE) when there is a ledger in its place, or one to finish and not `write`.
    """
    place.require_lost()
    last = place.built()
    if last is None or last.head != reported.head:
        return None
    if not write:
        raise FedmeshError(
            Code.WRONG_STATE, "a recovery was interrupted when the registry had been told of it: --write finishes it"
        )
    place.install()
    return last


def recovery_of(entry: Entry) -> Recovery:
    """What the entry of a recovery says."""
    said = entry.read()
    return Recovery(Basis(said["basis"]), said["epsilon"], said["delta"])


def require_meant(recovery: Recovery, *, all_spent: bool) -> None:
    """Raises: FedmeshError(CONFIG_INVALID) when everything would count as spent, and nobody said that it may."""
    if recovery.basis is Basis.ALL_SPENT and not all_spent:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            "the whole budget of 365 days would count as spent: say --all-spent if that is meant; else bring --log and"
            " --approval (docs/runbooks/LedgerLost.md)",
        )


def _invalid(what: str) -> FedmeshError:
    return FedmeshError(
        Code.PROOF_INVALID, f"the registry's copy of this hospital's ledger is not to be used: {what}. Keep all of it"
    )
