"""Rosters with keys, made once a process: founding one takes n signatures and n^2 checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from services.secure_sum import roster as rosters
from services.secure_sum.roster import MemberKeys, Roster


@dataclass(frozen=True)
class Consortium:
    """A founded roster and the keys of its members, which only the test holds together."""

    roster: Roster
    keys: Mapping[str, MemberKeys]
    founding: bytes
    signatures: Mapping[str, bytes]

    @property
    def ids(self) -> tuple[str, ...]:
        return self.roster.ids


@lru_cache
def consortium(size: int) -> Consortium:
    """`size` hospitals h01, h02, ... with a founding roster."""
    keys = {name: MemberKeys.generate(name) for name in (f"h{i:02}" for i in range(1, size + 1))}
    statement = rosters.found("simulated", [key.public() for key in keys.values()])
    signatures = {name: rosters.sign_roster(statement, key) for name, key in keys.items()}
    return Consortium(rosters.verify_founding(statement, signatures), keys, statement, signatures)


CHANGES: Final = ("join", "leave")


@lru_cache
def successor(size: int, change: str) -> Consortium:
    """The roster after `consortium(size)`, in which a hospital joined or the last one left; signed by t members."""
    before = consortium(size)
    keys = dict(before.keys)
    if change == "join":
        name = f"h{size + 1:02}"
        keys[name] = MemberKeys.generate(name)
    else:
        del keys[before.ids[-1]]
    statement = rosters.succeed(before.roster, [key.public() for key in keys.values()])
    signers = before.ids[: before.roster.threshold]
    signatures = {name: rosters.sign_roster(statement, before.keys[name]) for name in signers}
    return Consortium(rosters.verify_successor(before.roster, statement, signatures), keys, statement, signatures)
