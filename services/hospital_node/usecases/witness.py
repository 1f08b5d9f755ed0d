"""The hospital as a witness of the audit log (C2SP tlog-witness, with the roles of caller and callee exchanged).

Hospitals accept no connections, so a witness comes for checkpoints instead of being brought them. What it verified is
on its disk before it signs, and it never signs what does not follow from that. What it refuses it keeps, both
checkpoints, and says at every look for as long as the log stays so: in its own log and metrics, and to the centre's
operators.
"""

import asyncio
import random
from collections.abc import Iterable
from typing import Final, NoReturn

from prometheus_client import Counter, Gauge

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.witness_ports import AuditLog, Held, Refusal, RefusalKind, WitnessMemory
from services.hospital_node.usecases.disk import on_disk
from services.secure_sum.roster import MemberKeys
from services.transparency.checkpoint import Checkpoint, VerifierKey, open_checkpoint
from services.transparency.cosignature import cosign, log_signed, witness_name
from services.transparency.merkle import verify_consistency, verify_inclusion

log = get_logger(__name__)

LOOKS: Final = Counter("fedmesh_hospital_witness_looks_total", "Looks at the audit log by how they ended", ["outcome"])
SIZE: Final = Gauge("fedmesh_hospital_witness_size", "Entries of the audit log that were verified last")
ALARM: Final = Gauge("fedmesh_hospital_witness_alarm", "1 while this hospital refuses to cosign the audit log")

# Answers with which the log says that it cannot prove what it signed; others only say that it is busy or away.
_CANNOT_PROVE: Final = frozenset({Code.WRONG_STATE, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.PROOF_INVALID})
# Notes are kept as they came, up to this.
_KEPT_CHARACTERS: Final = 4096


class _Refused(Exception):
    def __init__(self, kind: RefusalKind, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind
        self.reason = reason


class Witness:
    """spot_checks: entries, chosen at random, that every look asks a proof for."""

    def __init__(
        self,
        audit: AuditLog,
        memory: WitnessMemory,
        keys: MemberKeys,
        consortium: str,
        verifier: VerifierKey,
        clock: Clock,
        spot_checks: int,
    ) -> None:
        self._audit = audit
        self._memory = memory
        self._keys = keys
        self._name = witness_name(consortium, keys.hospital_id)
        self._verifier = verifier
        self._log = str(verifier)
        self._clock = clock
        self._spot_checks = spot_checks

    async def keep(self, interval_s: float) -> None:
        """Look now, and then once in an interval, until cancelled. Nothing that the log does ends this loop."""
        while True:
            try:
                outcome = await self.look()
            except FedmeshError as error:
                outcome = "failed"
                log.warning("audit_log_not_seen", code=error.code.value, reason=error.message)
            except Exception as error:
                outcome = "failed"
                log.error("witness_failed", exc_info=error)
            LOOKS.labels(outcome).inc()
            await asyncio.sleep(interval_s * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load

    async def look(self) -> str:
        """Fetch the checkpoint on offer, verify it, cosign it: `cosigned`, `current`, `stale` or `refused`.

        stale: an older checkpoint than the one that is held, and the log still has that one.

        Raises: FedmeshError when the audit service or the disk is away.
        """
        held = await on_disk(self._memory.held, self._log)
        note = await self._audit.offered()
        try:
            seen = self._open(note)
            fresh = await self._follows(held, seen)
            await self._spot_check(Checkpoint(seen.origin, held.size, held.root) if held and not fresh else seen)
        except _Refused as refused:
            await self._refuse(held, note, refused)
            return "refused"
        ALARM.set(0)
        if not fresh:
            return "stale"
        return await self._cosign(held, seen, note)

    def _open(self, note: str) -> Checkpoint:
        try:
            return open_checkpoint(note, self._verifier)
        except FedmeshError as error:
            raise _Refused(RefusalKind.BAD_CHECKPOINT, error.message) from error

    async def _follows(self, held: Held | None, seen: Checkpoint) -> bool:
        """Whether the checkpoint is to be cosigned; False for one that is merely older.

        Raises: _Refused when it contradicts what is held.
        """
        if held is None or held.size == 0:
            return True
        if seen.size == held.size:
            if seen.root != held.root:
                _refuse(RefusalKind.FORK, f"two trees of {seen.size} entries with different roots")
            return True
        if seen.size > held.size:
            proof = await self._proof(held.size, seen.size, RefusalKind.UNPROVABLE)
            _verify(held.size, seen.size, held.root, seen.root, proof)
            return True
        # Clocks and replicas may offer an old checkpoint again. If nothing was lost, the log can still prove it.
        if seen.size == 0:
            _refuse(RefusalKind.ROLLBACK, f"the log is empty and had {held.size} entries")
        proof = await self._proof(seen.size, held.size, RefusalKind.ROLLBACK)
        _verify(seen.size, held.size, seen.root, held.root, proof)
        return False

    async def _proof(self, first: int, second: int, otherwise: RefusalKind) -> list[bytes]:
        try:
            return await self._audit.consistency(first, second)
        except FedmeshError as error:
            if error.code not in _CANNOT_PROVE:
                raise
            raise _Refused(otherwise, f"no proof from {first} to {second} entries: {error.message}") from error

    async def _spot_check(self, tree: Checkpoint) -> None:
        """Ask for some entries, as they are stored now, to be proven in the tree that was signed."""
        count = min(self._spot_checks, tree.size)
        for index in random.SystemRandom().sample(range(tree.size), count):
            try:
                leaf, proof = await self._audit.inclusion(index, tree.size)
                verify_inclusion(leaf, index, tree.size, proof, tree.root)
            except FedmeshError as error:
                if error.code not in _CANNOT_PROVE:
                    raise
                raise _Refused(RefusalKind.UNPROVABLE, f"entry {index}: {error.message}") from error

    async def _cosign(self, held: Held | None, seen: Checkpoint, note: str) -> str:
        if held is not None and held.size == seen.size and (held.cosigned or not seen.size):
            return "current"
        if held is None or held.size != seen.size:
            now = Held(seen.size, seen.root, log_signed(note, seen.origin), cosigned=False)
            # On the disk before it is signed: after a restart this node must not sign anything older.
            await on_disk(self._memory.hold, self._log, held, now)
            held = now
        SIZE.set(seen.size)
        if not seen.size:
            return "current"
        line = cosign(held.note, self._name, self._keys.signing, int(self._clock.now().timestamp()))
        await self._audit.add_cosignature(seen.size, self._keys.signing.public_key().public_bytes_raw(), line)
        await on_disk(self._memory.mark_cosigned, self._log, seen.size)
        log.debug("audit_log_cosigned", size=seen.size)
        return "cosigned"

    async def _refuse(self, held: Held | None, note: str, refused: _Refused) -> None:
        ALARM.set(1)
        shown = _first_lines(note, self._verifier.name)
        before = "" if held is None else held.note
        refusal = Refusal(self._log, refused.kind, before, shown, refused.reason, self._clock.now())
        kept, fresh = await on_disk(self._memory.keep_evidence, refusal)
        log.error("audit_log_refused", kind=refused.kind.value, reason=refused.reason, fresh=fresh)
        try:
            await self._audit.raise_alarm(kept)
        except FedmeshError as error:
            # It is raised again at the next look.
            log.warning("alarm_not_delivered", code=error.code.value, reason=error.message)


def _verify(first: int, second: int, first_root: bytes, second_root: bytes, proof: Iterable[bytes]) -> None:
    try:
        verify_consistency(first, second, first_root, second_root, list(proof))
    except FedmeshError as error:
        raise _Refused(RefusalKind.FORK, error.message) from error


def _refuse(kind: RefusalKind, reason: str) -> NoReturn:
    raise _Refused(kind, reason)


def _first_lines(note: str, origin: str) -> str:
    """What the log said, without the witnesses' lines; a note that is malformed as it came, within limits."""
    try:
        return log_signed(note, origin)[:_KEPT_CHARACTERS]
    except FedmeshError:
        return note[:_KEPT_CHARACTERS]
