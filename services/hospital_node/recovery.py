"""Composition of a ledger's recovery: the node's configuration, the registry's copy, an export of the audit log."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1 import registry_pb2_grpc as rpc

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.ids import new_id
from services.hospital_node.config import HospitalConfig, read_log_key, read_membership
from services.hospital_node.domain.ports import LedgerStanding
from services.hospital_node.store.ledger_recovery import SqliteLostLedger
from services.hospital_node.store.state import open_data_dir
from services.hospital_node.usecases import recovering
from services.hospital_node.wire import parse_standing
from services.privacy.chain import Entry, Head
from services.privacy.recovery import Recovery, approved_recovery
from services.secure_sum.roster import MemberKeys, Roster
from services.transparency.canonical import parse_canonical
from services.transparency.export import CHECKPOINT, ENTRIES
from services.transparency.verify import verify_export
from services.transparency.witness import Witnessed, best_witnessed, follow

_PATIENCE_S: Final = 20.0


class RegistryCopy:
    """See `domain.recovery_ports.LedgerCopy` for the contract."""

    def __init__(self, hospital_id: str, registry: MeshChannel) -> None:
        self._hospital_id = hospital_id
        self._stub = registry.stub(rpc.RegistryServiceStub)

    async def head(self) -> tuple[LedgerStanding, int]:
        ledgers = (await self._call(self._stub.ListLedgers, pb.ListLedgersRequest())).ledgers
        own = next((item for item in ledgers if item.hospital_id == self._hospital_id), pb.HospitalLedger())
        return parse_standing(own.head), own.uncharged

    async def entries_after(self, seq: int) -> Sequence[Entry]:
        request = pb.ListLedgersRequest(hospital_id=self._hospital_id, after_seq=seq)
        found = await self._call(self._stub.ListLedgers, request)
        return [Entry(item.seq, item.body, item.sha256) for item in found.entries]

    async def report(self, head: Head, signature: bytes, entries: Sequence[Entry]) -> LedgerStanding:
        request = pb.ReportLedgerRequest(
            request_id=new_id(),
            head=pb.LedgerHead(seq=head.seq, sha256=head.sha256, signature=signature),
            entries=[pb.LedgerEntry(seq=item.seq, body=item.body, sha256=item.sha256) for item in entries],
        )
        answer = await self._call(self._stub.ReportLedger, request)
        return parse_standing(answer.head, differs=answer.differs)

    async def rosters(self, founding: Roster) -> list[Roster]:
        """The rosters that follow from the founding one, verified. Raises: FedmeshError."""
        listed = (await self._call(self._stub.ListRosters, pb.ListRostersRequest(after_version=1))).rosters
        signed = [(item.statement, {one.hospital_id: one.signature for one in item.signatures}) for item in listed]
        return follow(founding, signed)

    async def _call(self, method: Any, request: Any) -> Any:
        return await call(method, request, patience_s=_PATIENCE_S)


@dataclass(frozen=True)
class Evidence:
    """What the hospital's admin brings. log: a folder of `fedmesh audit export --witnessed`. approval: a file of
    `fedmesh privacy approve-recovery`. all_spent: where they leave it open what was spent, everything may count."""

    log: Path | None = None
    approval: Path | None = None
    all_spent: bool = False


@dataclass(frozen=True)
class Outlook:
    """What a recovery would be, or was. kept: the head in the ledger's second file. witnessed: who cosigned the log
    that was brought. done: the entry of the recovery, once the ledger is in its place."""

    reported: recovering.Reported
    recovery: Recovery
    kept: Head
    witnessed: Witnessed | None = None
    done: Entry | None = None


async def recover_ledger(config: HospitalConfig, evidence: Evidence, clock: Clock, *, write: bool) -> Outlook:
    """Look at what can be recovered, and do it when `write`.

    Raises: FedmeshError(WRONG_STATE) for a folder with a ledger, (PROOF_INVALID) for a copy or a log that is not to be
        trusted, (CONFIG_INVALID) for settings, approvals and keys that no roster lists, errors of the registry.
    """
    keys, founding = read_membership(config)
    lock = open_data_dir(config.data_dir)
    try:
        place = SqliteLostLedger(config.data_dir)
        place.require_lost()
        async with MeshChannel(config.registry.target, config.tls) as channel:
            copy = RegistryCopy(config.hospital_id, channel)
            rosters = await copy.rosters(founding)
            _require_listed(keys, rosters[-1])
            reported = await recovering.read_copy(copy, config.hospital_id, _signing_keys(config, keys, rosters))
            interrupted = recovering.finish(place, reported, write=write)
            if interrupted is not None:
                return Outlook(reported, recovering.recovery_of(interrupted), reported.head, done=interrupted)
            outlook = _outlook(config, evidence, place.kept_head(), reported, rosters)
            if not write:
                return outlook
            recovering.require_meant(outlook.recovery, all_spent=evidence.all_spent)
            done = await recovering.recover(place, copy, keys, reported, outlook.recovery, clock.now())
            return replace(outlook, done=done)
    finally:
        os.close(lock)


def _require_listed(keys: MemberKeys, newest: Roster) -> None:
    """Raises: FedmeshError(CONFIG_INVALID) while the registry would take no report under these keys."""
    own = keys.public()
    if own not in newest.statement.members:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"roster version {newest.statement.version}, the newest, does not list {own.hospital_id} with the keys in"
            " its member_keys: a ledger is recovered once one does",
        )


def _outlook(
    config: HospitalConfig, evidence: Evidence, kept: Head, reported: recovering.Reported, rosters: Sequence[Roster]
) -> Outlook:
    logged, witnessed = _logged(config, evidence.log, rosters)
    approved = None
    if evidence.approval is not None:
        approvers = config.privacy.approvers
        approved = approved_recovery(evidence.approval, config.hospital_id, reported.head, approvers)
    recovery = recovering.what_is_unknown(reported, kept, logged, approved)
    return Outlook(reported, recovery, kept, witnessed)


def _signing_keys(config: HospitalConfig, keys: MemberKeys, rosters: Sequence[Roster]) -> set[str]:
    """All keys by which this hospital ever was a member: it may have lost those of before, too."""
    named = {roster.signing_key(config.hospital_id).hex() for roster in rosters if config.hospital_id in roster}
    return named | {keys.public().signing_key}


def _logged(
    config: HospitalConfig, folder: Path | None, rosters: Sequence[Roster]
) -> tuple[Head | None, Witnessed | None]:
    """The newest head that the witnessed log tells of, and who witnessed it.

    Raises: FedmeshError(PROOF_INVALID) for an export that is wrong or was not witnessed, (CONFIG_INVALID).
    """
    if folder is None:
        return None, None
    if config.witness is None:
        raise FedmeshError(Code.CONFIG_INVALID, "the configuration has no section `witness`: by which key is the log?")
    verify_export(folder, read_log_key(config.witness, rosters[0].statement.consortium))
    witnessed = best_witnessed((folder / CHECKPOINT).read_text(encoding="utf-8"), rosters)
    if not witnessed.complete:
        raise FedmeshError(
            Code.PROOF_INVALID,
            f"{len(witnessed.signers)} of {witnessed.roster.size} hospitals cosigned the exported log, "
            f"{witnessed.roster.threshold} are needed: fedmesh audit export --witnessed",
        )
    return recovering.newest_told(_leaves(folder), config.hospital_id), witnessed


def _leaves(folder: Path) -> Iterator[dict[str, Any]]:
    with (folder / ENTRIES).open(encoding="utf-8") as lines:
        for line in lines:
            yield parse_canonical(parse_canonical(line.rstrip("\n").encode())["leaf"].encode())
