"""Between protobuf messages and the registry's own types: reported privacy ledgers."""

from collections.abc import Sequence
from typing import Final

from fedmesh.registry.v1 import registry_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_sha256
from services.privacy.chain import MAX_BODY_BYTES, Entry, Head
from services.registry import wire
from services.registry.domain.entities import LedgerReport, LedgerStanding, ReportedLedger
from services.secure_sum.statements import SIGNATURE_BYTES

MAX_ENTRIES: Final = 200
_MAX_SEQ: Final = 2**53


def read_report(request: pb.ReportLedgerRequest, caller: Identity) -> LedgerReport:
    """Raises: FedmeshError(INVALID_ARGUMENT | TOO_LARGE) naming the field that is malformed."""
    if len(request.entries) > MAX_ENTRIES:
        raise FedmeshError(Code.TOO_LARGE, f"entries: {len(request.entries)}, {MAX_ENTRIES} at most")
    if len(request.head.signature) != SIGNATURE_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"head.signature must have {SIGNATURE_BYTES} bytes")
    sha256 = require_sha256(request.head.sha256, "head.sha256") if request.head.seq else ""
    if request.head.sha256 != sha256:
        raise FedmeshError(Code.INVALID_ARGUMENT, "head.sha256 of an empty ledger is empty")
    entries = tuple(_read_entry(entry) for entry in request.entries)
    head = Head(_require_seq(request.head.seq, "head.seq"), sha256)
    return LedgerReport(caller.name, head, request.head.signature, entries)


def _read_entry(message: pb.LedgerEntry) -> Entry:
    if not 0 < len(message.body) <= MAX_BODY_BYTES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"entries.body must have 1 to {MAX_BODY_BYTES} bytes")
    seq = _require_seq(message.seq, "entries.seq")
    return Entry(seq, message.body, require_sha256(message.sha256, "entries.sha256"))


def _require_seq(seq: int, field: str) -> int:
    if seq > _MAX_SEQ:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} is too large", field=field)
    return seq


def require_size(size: int) -> int:
    """How many entries a listing has at most. Raises: FedmeshError(INVALID_ARGUMENT)."""
    if size > MAX_ENTRIES:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"page_size: {MAX_ENTRIES} at most", field="page_size")
    return size or MAX_ENTRIES


def standing(value: LedgerStanding) -> pb.ReportLedgerResponse:
    return pb.ReportLedgerResponse(head=_head(value.head, value.signature), differs=value.differs)


def listed(ledgers: Sequence[ReportedLedger], entries: Sequence[Entry]) -> pb.ListLedgersResponse:
    return pb.ListLedgersResponse(
        ledgers=[
            pb.HospitalLedger(
                hospital_id=ledger.hospital_id,
                head=_head(ledger.head, ledger.signature),
                reported_at=wire.timestamp(ledger.reported_at),
                uncharged=ledger.uncharged,
            )
            for ledger in ledgers
        ],
        entries=wire.fitting(
            [pb.LedgerEntry(seq=entry.seq, body=entry.body, sha256=entry.sha256) for entry in entries]
        ),
    )


def _head(head: Head, signature: bytes) -> pb.LedgerHead:
    return pb.LedgerHead(seq=head.seq, sha256=head.sha256, signature=signature)
