"""The rosters that this hospital believes in: the founding one, which it was given, and what follows from it."""

import hashlib

from services.common.errors import Code, FedmeshError
from services.common.telemetry import get_logger
from services.hospital_node.domain.ports import Mesh, NodeState, RosterFacts
from services.secure_sum.roster import Roster, verify_successor

log = get_logger(__name__)


class Rosters:
    """A chain in which every roster is signed by enough members of the one before. It only ever grows."""

    def __init__(self, founding: Roster, state: NodeState, mesh: Mesh) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when what was verified before does not follow from `founding`."""
        self._state = state
        self._mesh = mesh
        self._chain = {founding.sha256: founding}
        self.newest = founding
        for facts in state.rosters():
            try:
                self._append(verify_successor(self.newest, facts.statement, facts.signatures))
            except FedmeshError as error:
                raise FedmeshError(
                    Code.CONFIG_INVALID,
                    "the founding roster is not the one that this node began with; it followed it up to version"
                    f" {self.newest.statement.version}: {error.message}",
                ) from error

    async def get(self, sha256: str, patience_s: float) -> Roster:
        """A roster of the chain; the registry is asked for what is new when it is not known.

        Raises: FedmeshError(STATEMENT_INVALID) for one that is not in it; errors of the registry.
        """
        if sha256 not in self._chain:
            await self.refresh(patience_s)
        if sha256 not in self._chain:
            raise FedmeshError(
                Code.STATEMENT_INVALID,
                f"roster {sha256[:16]} does not follow from this hospital's founding roster: refused",
            )
        return self._chain[sha256]

    def version(self, sha256: str) -> int:
        """The version of a roster of the chain; 0 for any other."""
        return self._chain[sha256].statement.version if sha256 in self._chain else 0

    def signing_keys(self, hospital_id: str) -> dict[str, int]:
        """All signing keys (64 hex digits) by which rosters of the chain list a hospital, oldest first, and the version
        of the first roster that does.

        Whoever hides a roster hides all after it: a chain that reaches a hospital's present key has all earlier ones.
        """
        found: dict[str, int] = {}
        for roster in self._chain.values():
            if hospital_id in roster:
                found.setdefault(roster.signing_key(hospital_id).hex(), roster.statement.version)
        return found

    async def refresh(self, patience_s: float) -> None:
        """Take what the registry has after the newest roster, as far as it is in order."""
        for facts in await self._mesh.list_rosters(self.newest.statement.version, patience_s):
            if hashlib.sha256(facts.statement).hexdigest() in self._chain:
                # Taken meanwhile, by another look at the registry.
                continue
            try:
                following = verify_successor(self.newest, facts.statement, facts.signatures)
            except FedmeshError as error:
                log.error("roster_refused", after=self.newest.statement.version, reason=error.message)
                return
            self._remember(following, facts)

    def _remember(self, roster: Roster, facts: RosterFacts) -> None:
        if roster.sha256 in self._chain:
            return
        self._state.save_roster(roster.statement.version, facts)
        self._append(roster)
        log.info("roster_adopted", version=roster.statement.version, members=roster.size, roster=roster.sha256)

    def _append(self, roster: Roster) -> None:
        self._chain[roster.sha256] = roster
        self.newest = roster
