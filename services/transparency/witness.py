"""Who witnesses a log: the hospitals of the roster, under their roster signing keys (ADR 14)."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from services.secure_sum.roster import Roster, verify_successor
from services.transparency.cosignature import WitnessKey, witness_name, witnesses


@dataclass(frozen=True)
class Witnessed:
    """Who of a roster cosigned a checkpoint. signers: hospital, and when, in seconds since 1970 UTC."""

    roster: Roster
    signers: dict[str, int]

    @property
    def complete(self) -> bool:
        """Whether a quorum did: more than two thirds of the roster."""
        return len(self.signers) >= self.roster.threshold

    @property
    def since(self) -> int:
        """When the quorum was reached, in seconds since 1970 UTC by the witnesses' clocks; 0 when it was not."""
        return sorted(self.signers.values())[self.roster.threshold - 1] if self.complete else 0


def witness_keys(roster: Roster) -> dict[str, WitnessKey]:
    """The witness key of every hospital of a roster, by hospital."""
    consortium = roster.statement.consortium
    return {name: WitnessKey(witness_name(consortium, name), roster.signing_key(name)) for name in roster.ids}


def witnessed(note: str, roster: Roster) -> Witnessed:
    """Who of the roster cosigned a checkpoint. The log's own signature is checked elsewhere.

    Raises: FedmeshError(PROOF_INVALID) when the note is malformed or one of their lines is wrong.
    """
    keys = witness_keys(roster)
    times = witnesses(note, keys.values())
    return Witnessed(roster, {name: times[key.name] for name, key in keys.items() if key.name in times})


def best_witnessed(note: str, rosters: Sequence[Roster]) -> Witnessed:
    """As `witnessed`, under the newest of these rosters (oldest first) whose quorum cosigned, else under the newest."""
    found = [witnessed(note, roster) for roster in reversed(rosters)]
    return next((item for item in found if item.complete), found[0])


def follow(founding: Roster, successors: Iterable[tuple[bytes, dict[str, bytes]]]) -> list[Roster]:
    """The chain of rosters that follows from the founding one, oldest first; each verified under the one before.

    successors: statement and signatures by hospital.

    Raises: FedmeshError(STATEMENT_INVALID) for one that does not follow.
    """
    chain = [founding]
    for statement, signatures in successors:
        chain.append(verify_successor(chain[-1], statement, signatures))
    return chain
