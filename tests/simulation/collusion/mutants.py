"""The protocol with one thing missing, and the strategy that must then succeed: proof that games can be lost."""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from unittest.mock import patch

from services.secure_sum import member as member_module
from services.secure_sum import opening, statements
from services.secure_sum import roster as roster_module
from services.secure_sum.derive import MaskPlan
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import Roster
from services.secure_sum.statements import (
    Advert,
    AttemptRef,
    Reveal,
    RevealedShare,
    Share,
    Signed,
    Signers,
    Survivors,
    Upload,
)
from tests.simulation.collusion import equivocation, groups, strategies
from tests.simulation.collusion.attack import Attack
from tests.simulation.collusion.game import Build
from tests.simulation.hospital import Hospital, Outcome
from tests.simulation.messages import Task


class NoSelfMask(Member):
    def mask_plan(self, state: MemberState) -> MaskPlan:
        return super().mask_plan(state)[1:]


class NoPairMasks(Member):
    def mask_plan(self, state: MemberState) -> MaskPlan:
        return super().mask_plan(state)[:1]


class SameSeeds(Member):
    """The seeds of every attempt are the same."""

    def begin(self, attempt: AttemptRef, epoch: int, cohort: Iterable[str], age: int = 0) -> MemberState:
        with patch.object(member_module, "os", _Fixed(self._id)):
            return super().begin(attempt, epoch, tuple(cohort), age)


class _Fixed:
    """In place of the module `os`."""

    def __init__(self, of: str) -> None:
        self._of, self._calls = of, 0

    def urandom(self, size: int) -> bytes:
        self._calls += 1
        return hashlib.sha256(f"{self._of} {self._calls}".encode()).digest()[:size]


class AnyList(Member):
    """Reveals for every list that it is shown, signed or not."""

    def confirm(self, state: MemberState, survivors: bytes) -> MemberState:
        signature = statements.sign_bytes(survivors, self._keys)
        return replace(state, survivors=survivors, confirmation=signature, reveal=None)

    def reveal(
        self, state: MemberState, confirmations: Mapping[str, bytes], others: Iterable[MemberState] = ()
    ) -> MemberState:
        with patch.object(opening, "check_confirmed", _unsigned_list):
            return super().reveal(state, {}, ())


class UnsignedList(Member):
    """Reveals for a list that nobody else signed, but for one list in an attempt."""

    def reveal(
        self, state: MemberState, confirmations: Mapping[str, bytes], others: Iterable[MemberState] = ()
    ) -> MemberState:
        with patch.object(opening, "check_confirmed", _unsigned_list):
            return super().reveal(state, confirmations, others)


def _unsigned_list(survivors: bytes, roster: Roster, confirmations: Mapping[str, bytes]) -> Survivors:
    return statements.parse(Survivors, survivors)


class WithoutSelfMask(Hospital):
    member_type = NoSelfMask


class WithoutPairMasks(Hospital):
    member_type = NoPairMasks


class WithSameSeeds(Hospital):
    member_type = SameSeeds


class WithAnyList(Hospital):
    member_type = AnyList


class WithUnsignedList(Hospital):
    member_type = UnsignedList


class TellsBothSecrets(Hospital):
    """Reveals its shares of the mask seeds as well as those of the self seeds."""

    def _unmask(self, task: Task) -> Outcome:
        outcome = super()._unmask(task)
        told = statements.parse(Reveal, outcome.answer.signed[0].statement)
        more = told.model_copy(
            update={
                "shares": tuple(
                    RevealedShare(of=of, kind="mask", share=pair.mask_share.hex())
                    for of, pair in sorted(outcome.state.shares_in.items())
                )
            }
        )
        signed = (*outcome.answer.signed, statements.sign(more, self._keys))
        return replace(outcome, answer=replace(outcome.answer, signed=signed))


class ForgetsReveals(Hospital):
    def other_attempts(self, attempt: AttemptRef) -> list[MemberState]:
        return []


class BelievesSums(Hospital):
    def check_sum(self, state: MemberState, task: Task) -> None:
        pass


def unsigned(*kinds: type[statements.Statement]) -> object:
    """`open_signed` that does not look at the signature of some statements."""
    real = statements.open_signed

    def open_signed(kind: type[statements.Statement], signed: Signed, signers: Signers) -> statements.Statement:
        return statements.parse(kind, signed.statement) if kind in kinds else real(kind, signed, signers)

    return open_signed


def unchecked_seed(attempt: AttemptRef, known: opening.MaskKey, found: opening.Opening) -> None:
    pass


def any_sharers(signed: Signed, signers: Signers, attempt: AttemptRef, adverts: str, sharers: Iterable[str]) -> Upload:
    return statements.open_signed(Upload, signed, signers)


def any_uploads(survivors: bytes, roster: Roster, uploads: Iterable[Signed]) -> dict[str, Upload]:
    listed = statements.parse(Survivors, survivors).ids
    return {h: statements.parse(Upload, s.statement) for h, s in zip(listed, uploads, strict=True)}


def any_successor(current: Roster, statement: bytes, signatures: Mapping[str, bytes]) -> Roster:
    return roster_module.as_roster(statement)


@dataclass(frozen=True)
class Mutant:
    """A build, and who breaks it."""

    build: Build
    broken_by: type[Attack]
    opens_targets: bool = False
    """Uploads in which the two worlds differ are opened, so that they are told apart."""


MUTANTS = (
    Mutant(Build("no self mask", WithoutSelfMask, self_masks=False), strategies.DropOne, opens_targets=True),
    Mutant(Build("no pair masks", WithoutPairMasks, pair_masks=False), strategies.Look, opens_targets=True),
    Mutant(Build("masks reused", WithSameSeeds), strategies.CompareRounds),
    Mutant(Build("noise reused", fresh_noise=False), strategies.CompareRounds),
    Mutant(
        Build("unsigned adverts and shares", patches=((opening, "open_signed", unsigned(Advert, Share)),)),
        equivocation.SwapAdverts,
        opens_targets=True,
    ),
    Mutant(Build("any list of survivors", WithAnyList), equivocation.RevealTwice),
    Mutant(Build("both secrets revealed", TellsBothSecrets), strategies.Look, opens_targets=True),
    Mutant(Build("two reveals in a round", ForgetsReveals), strategies.RetryAfterUnmasking),
    Mutant(Build("seeds unchecked", patches=((opening, "_check_seed", unchecked_seed),)), strategies.LieAboutSeeds),
    Mutant(Build("dealers unchecked", patches=((opening, "_check_seed", unchecked_seed),)), strategies.DealBadly),
    Mutant(Build("sums unchecked", BelievesSums), strategies.WrongSum),
    Mutant(
        Build("sharers unchecked", patches=((opening, "check_upload", any_sharers),)), equivocation.EquivocateSharers
    ),
    Mutant(Build("uploads unchecked", patches=((opening, "check_listed", any_uploads),)), strategies.CountTwice),
    Mutant(
        Build("roster without a quorum", patches=((roster_module, "verify_successor", any_successor),)),
        groups.Sybils,
    ),
)

SPARE = (
    Mutant(
        Build("unsigned adverts only", patches=((opening, "open_signed", unsigned(Advert)),)), equivocation.SwapAdverts
    ),
    Mutant(Build("unsigned list, but one", WithUnsignedList), equivocation.RevealTwice),
    Mutant(Build("unsigned list, but one", WithUnsignedList), equivocation.EquivocateSurvivors),
)
"""One lock of two: the other one still holds."""
