"""Rosters that follow others, as the registry hands them out."""

from collections.abc import Iterable

from services.hospital_node.domain.ports import RosterFacts
from services.secure_sum.roster import MemberKeys, Roster, sign_roster, succeed


def following(before: Roster, members: Iterable[MemberKeys], signers: Iterable[MemberKeys]) -> RosterFacts:
    """The roster of these members after `before`, with these signatures."""
    statement = succeed(before, [keys.public() for keys in members])
    return RosterFacts(statement, {keys.hospital_id: sign_roster(statement, keys) for keys in signers})
