"""What hospitals do as witnesses of the log: cosign what is offered, raise alarms; and reading both.

The service checks that a cosignature fits the stored checkpoint and the key that the hospital names, which keeps out
what nobody could use. Whether the key is the hospital's is for readers to say, who have the roster: the centre's word
would prove nothing.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final

from prometheus_client import Counter

from services.audit.domain.witnesses import (
    MAX_ALARMS_OF_A_HOSPITAL,
    MAX_NOTE_CHARACTERS,
    MAX_REASON,
    Alarm,
    AlarmKind,
    Cosigned,
)
from services.audit.ports import CosignedHead, Store, Transaction
from services.audit.sequencer import empty_head
from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.common.ids import require_uuid
from services.common.telemetry import get_logger
from services.transparency.checkpoint import SigningKey, open_checkpoint
from services.transparency.cosignature import WitnessKey, attach, verify_line, witness_name
from services.transparency.merkle import MAX_SIZE

log = get_logger(__name__)

MAX_PAGE: Final = 100
_DEFAULT_PAGE: Final = 20
_KEY_BYTES: Final = 32
# A witness's clock may be so far ahead of ours.
_CLOCK_SKEW_S: Final = 300

_COSIGNATURES: Final = Counter("fedmesh_audit_cosignatures_total", "Cosignatures stored", ["hospital"])
_ALARMS: Final = Counter("fedmesh_audit_alarms_total", "Alarms of witnesses, repetitions included", ["kind"])
for _kind in AlarmKind:
    _ALARMS.labels(_kind.value)


class WitnessUseCases:
    def __init__(self, store: Store, key: SigningKey, clock: Clock, period_s: float) -> None:
        self._store = store
        self._key = key
        self._clock = clock
        self._period_s = period_s

    async def offered(self) -> str:
        """The signed checkpoint that witnesses are asked to cosign now."""
        head = await self._store.run("offered", lambda tx: tx.offered(self._period_s))
        return (head or empty_head(self._key)).note

    async def add_cosignature(self, caller: Identity, request_id: str, size: int, public_key: bytes, line: str) -> None:
        """Store a hospital's cosignature of a checkpoint; a second one for the same size changes nothing.

        Raises: FedmeshError(NOT_FOUND) for a size at which no checkpoint was signed, (PROOF_INVALID) for a line that
            does not fit the checkpoint and the key, (INVALID_ARGUMENT) for a time that is not yet or another key form.
        """
        require_uuid(request_id, "request_id")
        if len(public_key) != _KEY_BYTES:
            raise FedmeshError(Code.INVALID_ARGUMENT, f"public_key has {_KEY_BYTES} bytes, not {len(public_key)}")
        key = WitnessKey(witness_name(caller.consortium, caller.name), public_key)
        now = self._clock.now()

        async def add(tx: Transaction) -> bool:
            head = await tx.checkpoint(size) if size <= MAX_SIZE else None
            if head is None:
                raise FedmeshError(Code.NOT_FOUND, f"no checkpoint was signed over {size} entries")
            timestamp = verify_line(head.note, line, key)
            if timestamp > now.timestamp() + _CLOCK_SKEW_S:
                raise FedmeshError(Code.INVALID_ARGUMENT, "the cosignature is of the future: set your clock")
            at = datetime.fromtimestamp(timestamp, UTC)
            return await tx.add_cosignature(Cosigned(size, caller.name, public_key, line, at), now)

        if await self._store.run("add_cosignature", add):
            _COSIGNATURES.labels(caller.name).inc()

    async def cosigned(self, before_size: int, limit: int) -> list[tuple[CosignedHead, str]]:
        """Checkpoints with cosignatures, newest first, and each as one note with all its signatures.

        Raises: FedmeshError(INVALID_ARGUMENT) for a limit out of range.
        """
        limit = _page(limit)
        before = min(before_size or MAX_SIZE, MAX_SIZE)
        heads = await self._store.run("cosigned", lambda tx: tx.cosigned(before, limit))
        return [(head, attach(head.note, (one.line for one in head.cosigned))) for head in heads]

    async def raise_alarm(
        self, caller: Identity, request_id: str, kind: AlarmKind, held: str, seen: str, reason: str
    ) -> None:
        """Store what a hospital refused to cosign, and tell whoever reads our log and metrics.

        Raises: FedmeshError(PROOF_INVALID) when `held` was not signed by this log, (TOO_LARGE) for long texts,
            (RATE_LIMITED) when the hospital has stored too many.
        """
        require_uuid(request_id, "request_id")
        if max(len(held), len(seen)) > MAX_NOTE_CHARACTERS:
            raise FedmeshError(Code.TOO_LARGE, f"a checkpoint has at most {MAX_NOTE_CHARACTERS} characters")
        # A log under another key is alarm enough: then this key has signed neither.
        if held and kind is not AlarmKind.BAD_CHECKPOINT:
            open_checkpoint(held, self._key.verifier)
        # PostgreSQL's text takes no NUL.
        seen, reason = seen.replace("\0", ""), reason.replace("\0", "")[:MAX_REASON]
        alarm = Alarm(caller.name, kind, held, seen, reason, self._clock.now())

        async def add(tx: Transaction) -> bool:
            if await tx.alarm_count(caller.name) >= MAX_ALARMS_OF_A_HOSPITAL:
                raise FedmeshError(Code.RATE_LIMITED, "this hospital has raised too many different alarms")
            return await tx.add_alarm(alarm)

        fresh = await self._store.run("add_alarm", add)
        _ALARMS.labels(kind.value).inc()
        log.error("witness_alarm", hospital=caller.name, kind=kind.value, reason=alarm.reason, fresh=fresh)

    async def alarms(self, limit: int) -> tuple[Sequence[Alarm], int]:
        """Alarms, newest first, and how many there are altogether.

        Raises: FedmeshError(INVALID_ARGUMENT) for a limit out of range.
        """
        limit = _page(limit)

        async def read(tx: Transaction) -> tuple[Sequence[Alarm], int]:
            return await tx.alarms(limit), await tx.alarm_count()

        return await self._store.run("alarms", read)


def _page(limit: int) -> int:
    if limit > MAX_PAGE:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"limit is 1 to {MAX_PAGE}, or 0 for {_DEFAULT_PAGE}, not {limit}")
    return limit or _DEFAULT_PAGE
