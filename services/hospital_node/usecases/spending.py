"""Telling the registry what this hospital's ledger says, and noticing when the two do not agree.

The hospital's ledger is authoritative. What it reported is signed by itself, so a registry that shows a newer head with
this hospital's signature proves that the ledger here is an older copy: nothing is spent then. A registry that shows
anything else is wrong, and is not believed.

The signature may be by any key that a roster ever listed for this hospital: it may have lost its ledger and its keys
together. Rosters are signed by hospitals, and form a chain: whoever shows the one with the present key has shown all
earlier keys. So they also say, whatever the registry shows, that a hospital was a member before; an empty ledger is a
lost one then.
"""

import asyncio
import random
from contextlib import suppress
from typing import Final

from prometheus_client import Gauge

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Ledger, LedgerStanding, Mesh
from services.hospital_node.usecases.disk import on_disk
from services.hospital_node.usecases.releasing import release_ended
from services.hospital_node.usecases.rosters import Rosters
from services.privacy.chain import Head
from services.secure_sum.roster import MemberKeys

log = get_logger(__name__)

DIFFERS: Final = Gauge(
    "fedmesh_hospital_ledger_differs",
    "1 while the registry shows another privacy ledger of this hospital than its own, or its own is lost",
)
_BATCH: Final = 200
_PATIENCE_S: Final = 20.0
# What is charged within it is reported by one call: jobs that run side by side charge many times a second.
_GATHERED_S: Final = 1.0
# For the last report of a node that stops; whatever it misses is reported at the next start.
_FAREWELL_S: Final = 2.0
_FIRST_PAUSE_S: Final = 0.5
_LONGEST_PAUSE_S: Final = 60.0
_RUNBOOK: Final = "docs/runbooks/LedgerLost.md"


class Spending:
    """Compares once, then reports what is new. Safe for concurrent steps."""

    def __init__(self, keys: MemberKeys, rosters: Rosters, ledger: Ledger, mesh: Mesh) -> None:
        self._keys = keys
        self._rosters = rosters
        self._ledger = ledger
        self._mesh = mesh
        self._lock = asyncio.Lock()
        self._changed = asyncio.Event()
        # What the registry has; None before the two were compared.
        self._reported: Head | None = None
        self._trouble: FedmeshError | None = None

    def changed(self) -> None:
        """The ledger has new entries: report them soon."""
        self._changed.set()

    async def require_same(self, patience_s: float) -> None:
        """Check, before anything is spent, that the registry has no newer ledger of this hospital, and that the one
        here was not lost together with this hospital's former keys.

        Raises: FedmeshError(CONFIG_INVALID) when it has, or it was; (WRONG_STATE) while no roster lists the present
            keys; errors of the registry while the two were never compared.
        """
        if self._reported is None and self._trouble is None:
            async with self._lock:
                if self._reported is None:
                    await self._compare(patience_s)
        if self._trouble is not None:
            raise self._trouble

    async def keep(self) -> None:
        """Compare, give back what jobs that are over never used, then report whatever is new, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        settled = False
        while True:
            self._changed.clear()
            try:
                await self.report(_PATIENCE_S)
                if not settled and await release_ended(self._ledger, self._mesh, _PATIENCE_S):
                    self._changed.set()
                settled = True
            except FedmeshError as error:
                if error.code is Code.STATEMENT_INVALID:
                    # The registry has less than it had, as after a restore of an old backup.
                    log.warning("ledger_not_taken", reason=error.message)
                    self._reported = None
                log.debug("ledger_not_reported", reason=error.message)
                await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
                continue
            pause_s = _FIRST_PAUSE_S
            await self._changed.wait()
            await asyncio.sleep(_GATHERED_S)

    async def close(self) -> None:
        """Report what is still to be reported, if the registry answers soon."""
        if self._changed.is_set():
            with suppress(FedmeshError):
                await self.report(_FAREWELL_S)

    async def report(self, patience_s: float) -> None:
        """Report the entries that the registry does not have. Raises: as `require_same`."""
        await self.require_same(patience_s)
        async with self._lock:
            while self._reported is not None:
                entries = await on_disk(self._ledger.entries_after, self._reported.seq, _BATCH)
                if not entries:
                    return
                head = entries[-1].head
                standing = await self._mesh.report_ledger(head, self._sign(head), entries, patience_s)
                if standing.differs and await on_disk(self._ledger.has, standing.head):
                    # It shows what was reported to it and says that it is something else.
                    log.error("registry_contradicts_itself", seq=standing.head.seq)
                    DIFFERS.set(1)
                    self._reported = head
                    return
                if standing.differs:
                    self._judge(standing, await on_disk(self._ledger.head))
                    return
                self._reported = head

    async def _compare(self, patience_s: float) -> None:
        await self._rosters.refresh(patience_s)
        self._require_member()
        standing = await self._mesh.reported_ledger(patience_s)
        head = await on_disk(self._ledger.head)
        former = self._former_keys() if head == Head() else {}
        if not former and await on_disk(self._ledger.has, standing.head):
            self._reported = standing.head
            DIFFERS.set(0)
            return
        # So that the difference stands in the audit log: an older copy by its head, another history by its entries.
        after = max(min(standing.head.seq, head.seq) - 1, 0)
        entries = await on_disk(self._ledger.entries_after, after, _BATCH)
        shown = entries[-1].head if entries else head
        with suppress(FedmeshError):
            await self._mesh.report_ledger(shown, self._sign(shown), entries, patience_s)
        if former:
            self._refuse_lost(former, standing)
        else:
            self._judge(standing, head)

    def _require_member(self) -> None:
        """Raises: FedmeshError(WRONG_STATE) while the newest known roster does not list this hospital's present key:
        its former ones may not be known either then."""
        own, newest = self._keys.public(), self._rosters.newest
        if own.hospital_id in newest and newest.signing_key(own.hospital_id).hex() == own.signing_key:
            return
        log.warning("not_a_member", roster=newest.statement.version, signing_key=own.signing_key[:16])
        raise FedmeshError(
            Code.WRONG_STATE,
            f"roster version {newest.statement.version}, the newest, does not list {own.hospital_id} with the signing"
            f" key of its member_keys ({own.signing_key[:16]}): nothing is spent until one does",
        )

    def _former_keys(self) -> dict[str, int]:
        """Signing keys that this hospital had before its present one, with the first roster of each."""
        own = self._keys.public()
        keys = self._rosters.signing_keys(own.hospital_id)
        return {key: version for key, version in keys.items() if key != own.signing_key}

    def _refuse_lost(self, former: dict[str, int], standing: LedgerStanding) -> None:
        """An empty ledger of a hospital that was a member under other keys: whatever the registry shows, it is lost,
        unless two people say that nothing was ever in it."""
        DIFFERS.set(1)
        own, (key, version) = self._keys.public(), next(iter(former.items()))
        log.error("ledger_lost", registry=standing.head.seq, former_key=key[:16], roster=version)
        self._trouble = FedmeshError(
            Code.CONFIG_INVALID,
            f"this hospital's privacy ledger is empty, and roster version {version} lists {own.hospital_id} with"
            f" another signing key ({key[:16]}, now {own.signing_key[:16]}): it was a member before. What was spent"
            " then is not in the ledger, and nothing is spent: put the ledger of before back and start the node again;"
            f" where there is none, see {_RUNBOOK}",
        )

    def _judge(self, standing: LedgerStanding, head: Head) -> None:
        """Whom to believe when the registry's head is not in this hospital's ledger."""
        DIFFERS.set(1)
        own = self._keys.hospital_id
        keys = self._rosters.signing_keys(own)
        signer = standing.head.signer(own, keys, standing.signature) or ""
        log.error(
            "ledger_differs",
            own=head.seq,
            registry=standing.head.seq,
            sha256=standing.head.sha256[:16],
            signed=bool(signer),
            signing_key=signer[:16],
        )
        if not signer:
            # Reported as far as this registry can be told anything.
            self._reported = head
            return
        self._trouble = FedmeshError(
            Code.CONFIG_INVALID,
            f"this hospital's privacy ledger is not the one that it reported to the registry: it ends with entry"
            f" {head.seq}, and entry {standing.head.seq} ({standing.head.sha256[:16]}) was reported, signed by this"
            f" hospital's key {signer[:16]} of roster version {keys[signer]}. What has been spent is not known, and"
            " nothing is spent: put the newest copy back and start the node again; where there is none, see"
            f" {_RUNBOOK}",
        )

    def _sign(self, head: Head) -> bytes:
        return self._keys.signing.sign(head.to_sign(self._keys.hospital_id))
