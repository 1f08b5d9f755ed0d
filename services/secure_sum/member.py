"""A hospital's part in one attempt: pure steps from state to state, no input or output.

Make each returned state durable before anything from it is sent. A step that is repeated with the same input gives the
same answer, byte for byte; with another input it raises EQUIVOCATION, because two different answers in one attempt are
what a curious centre would need.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import NoReturn

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from services.common.errors import Code, FedmeshError
from services.secure_sum import derive, opening, shares
from services.secure_sum.derive import MaskPlan
from services.secure_sum.member_state import MemberState
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import (
    Advert,
    AttemptRef,
    Digest,
    Reveal,
    RevealedShare,
    Share,
    Signed,
    Survivor,
    Survivors,
    Upload,
    adverts_digest,
    parse,
    sharers_digest,
    sign,
    sign_bytes,
)

__all__ = ["Member", "MemberState"]


class Member:
    """One hospital as a member of one roster."""

    def __init__(self, keys: MemberKeys, roster: Roster) -> None:
        """Raises: FedmeshError(STATEMENT_INVALID) when the roster does not list the hospital with these keys."""
        public = keys.public()
        if public not in roster.statement.members:
            raise FedmeshError(Code.STATEMENT_INVALID, f"the roster does not list {keys.hospital_id} with its own keys")
        self._keys = keys
        self._roster = roster
        self._id = keys.hospital_id

    def begin(self, attempt: AttemptRef, epoch: int, cohort: Sequence[str], age: int = 0) -> MemberState:
        """Draw the secrets of an attempt and advertise their public halves. Every call makes another attempt's worth.

        age: of the contribution, in versions.

        Raises: FedmeshError(PRIVACY_REFUSED) when the cohort has fewer than t hospitals; (STATEMENT_INVALID) when it is
            not a part of the roster with this hospital in it.
        """
        members = _sorted_set(cohort, "the cohort")
        for name in members:
            self._roster.position(name)
        self._require_self(members, "the cohort")
        opening.require_threshold(len(members), self._roster, "the cohort")
        self_seed, mask_seed = os.urandom(derive.SEED_BYTES), os.urandom(derive.SEED_BYTES)
        transport = X25519PrivateKey.generate()
        with _arguments():
            advert = Advert(
                age=age,
                roster=self._roster.sha256,
                epoch=epoch,
                attempt=attempt,
                hospital_id=self._id,
                mask_key=derive.mask_key_pair(mask_seed).public_key().public_bytes_raw().hex(),
                transport_key=transport.public_key().public_bytes_raw().hex(),
                seed_commitment=derive.seed_commitment(attempt, self._id, self_seed),
            )
        return MemberState(
            attempt=attempt,
            roster=self._roster.sha256,
            epoch=epoch,
            cohort=members,
            self_seed=self_seed,
            mask_seed=mask_seed,
            transport_key=transport.private_bytes_raw(),
            advert=sign(advert, self._keys),
        )

    def share(self, state: MemberState, adverts: Sequence[Signed], oldest: int = 0) -> MemberState:
        """Take the sealed group, and share both seeds among it. Sets `adverts`, `shares_out`.

        oldest: the greatest age of a contribution.

        Raises: FedmeshError(PRIVACY_REFUSED) for a group below t; (STATEMENT_INVALID) for one that is not a part of the
            cohort with this hospital's own advert, or in which something is not in order; (EQUIVOCATION).
        """
        self._require_mine(state)
        ordered = tuple(sorted(adverts))
        if state.adverts:
            _require_same(adverts_digest(ordered) == adverts_digest(state.adverts), "group")
            return state
        group = opening.check_group(ordered, self._roster, state.attempt, state.epoch, state.cohort, oldest)
        if state.advert.statement not in (signed.statement for signed in ordered):
            _refuse("the group does not have this hospital's advert")
        t, n = self._roster.threshold, self._roster.size
        self_shares, mask_shares = shares.split(state.self_seed, t, n), shares.split(state.mask_seed, t, n)
        pairs = {
            name: SharePair(self_shares[position], mask_shares[position])
            for name in group
            for position in (self._roster.position(name),)
        }
        digest = adverts_digest(ordered)
        transport = X25519PrivateKey.from_private_bytes(state.transport_key)
        out = tuple(
            self._deal(state.attempt, digest, group[name], pairs[name], transport)
            for name in sorted(group)
            if name != self._id
        )
        return replace(state, adverts=ordered, shares_out=out, own_share=pairs[self._id])

    def _deal(
        self, attempt: AttemptRef, adverts: str, to: Advert, pair: SharePair, transport: X25519PrivateKey
    ) -> Signed:
        name = to.hospital_id
        context = derive.box_context(attempt, adverts, self._id, name)
        statement = Share(
            attempt=attempt,
            adverts=adverts,
            sender=self._id,
            recipient=name,
            box=shares.seal(pair, transport, bytes.fromhex(to.transport_key), context).hex(),
            self_commitment=derive.share_commitment(attempt, self._id, name, "self", pair.self_share),
            mask_commitment=derive.share_commitment(attempt, self._id, name, "mask", pair.mask_share),
        )
        return sign(statement, self._keys)

    def receive(self, state: MemberState, sharers: Sequence[str], received: Sequence[Signed]) -> MemberState:
        """Take the list of sharers and what the others of them sealed for this hospital.

        Sets `sharers`, `shares_in`, and `complaints`: the dealers whose box did not open or did not hold what they
        committed to. Their masks count all the same; their shares are missing.

        Raises: FedmeshError(PRIVACY_REFUSED) for fewer than t sharers; (STATEMENT_INVALID) when the sharers are not a
            part of the group with this hospital in it, or there is not one good statement from each other one;
            (EQUIVOCATION); (WRONG_STATE) before `share`.
        """
        self._require_mine(state)
        if not state.shares_out:
            _wrong_state("share", "receive")
        listed = _sorted_set(sharers, "the sharers")
        digest = adverts_digest([*received])
        if state.sharers:
            _require_same((listed, digest) == (state.sharers, state.received), "list of sharers or shares")
            return state
        group = {signed.hospital_id: parse(Advert, signed.statement) for signed in state.adverts}
        if not set(listed) <= group.keys():
            _refuse("a sharer is not in the group")
        self._require_self(listed, "the sharers")
        opening.require_threshold(len(listed), self._roster, "the list of sharers")
        adverts = adverts_digest(state.adverts)
        dealt = opening.check_received(received, self._roster, state.attempt, adverts, self._id)
        if dealt.keys() != set(listed) - {self._id}:
            _refuse("the shares are not one from every other sharer")
        transport = X25519PrivateKey.from_private_bytes(state.transport_key)
        opened = {name: self._open(share, group[name], transport) for name, share in sorted(dealt.items())}
        kept = {name: pair for name, pair in opened.items() if pair is not None}
        assert state.own_share is not None
        kept[self._id] = state.own_share
        complaints = tuple(name for name, pair in opened.items() if pair is None)
        return replace(state, sharers=listed, received=digest, shares_in=kept, complaints=complaints)

    def _open(self, share: Share, dealer: Advert, transport: X25519PrivateKey) -> SharePair | None:
        context = derive.box_context(share.attempt, share.adverts, share.sender, self._id)
        pair = shares.open_box(bytes.fromhex(share.box), transport, bytes.fromhex(dealer.transport_key), context)
        if pair is None:
            return None
        committed = (
            derive.share_commitment(share.attempt, share.sender, self._id, "self", pair.self_share),
            derive.share_commitment(share.attempt, share.sender, self._id, "mask", pair.mask_share),
        )
        return pair if committed == (share.self_commitment, share.mask_commitment) else None

    def mask_plan(self, state: MemberState) -> MaskPlan:
        """The keys of this hospital's mask over all sharers. Secret; recomputed, never stored.

        Raises: FedmeshError(WRONG_STATE) before `receive`.
        """
        self._require_mine(state)
        if not state.sharers:
            _wrong_state("receive", "mask")
        adverts = {signed.hospital_id: parse(Advert, signed.statement) for signed in state.adverts}
        private = derive.mask_key_pair(state.mask_seed)
        own = self._roster.position(self._id)
        plan = [(derive.self_key(state.self_seed, state.attempt, self._id), 1)]
        for name in state.sharers:
            if name != self._id:
                public = bytes.fromhex(adverts[name].mask_key)
                sign_of_pair = 1 if own < self._roster.position(name) else -1
                plan.append((derive.pair_key(private, public, state.attempt, self._id, name), sign_of_pair))
        return tuple(plan)

    def commit(
        self,
        state: MemberState,
        parameter_set: str,
        lanes: int,
        vector_length: int,
        ciphertext_sha256: str,
        segments: Sequence[str],
    ) -> MemberState:
        """Say what the masked upload is: SHA-256 of the whole and of each segment, hex. Sets `upload`.

        Raises: FedmeshError(INVALID_ARGUMENT); (EQUIVOCATION); (WRONG_STATE) before `receive`.
        """
        self._require_mine(state)
        if not state.sharers:
            _wrong_state("receive", "commit")
        with _arguments():
            statement = Upload(
                attempt=state.attempt,
                adverts=adverts_digest(state.adverts),
                hospital_id=self._id,
                parameter_set=parameter_set,
                lanes=lanes,
                vector_length=vector_length,
                sharers=sharers_digest(state.sharers),
                complaints=state.complaints,
                ciphertext_sha256=ciphertext_sha256,
                segments=tuple(segments),
            )
        if state.upload is not None:
            _require_same(statement.encode() == state.upload.statement, "upload")
            return state
        return replace(state, upload=sign(statement, self._keys))

    def confirm(self, state: MemberState, survivors: bytes) -> MemberState:
        """Sign the list of survivors. Sets `survivors`, `confirmation`. This is the promise on which all else rests.

        Raises: FedmeshError(PRIVACY_REFUSED) for fewer than t survivors; (STATEMENT_INVALID) when the list is not of
            this attempt, group and sharers, or does not name this hospital's own upload; (EQUIVOCATION);
            (WRONG_STATE) before `commit`.
        """
        self._require_mine(state)
        if state.upload is None:
            _wrong_state("commit", "confirm")
        if state.confirmation:
            _require_same(survivors == state.survivors, "list of survivors")
            return state
        statement = parse(Survivors, survivors)
        expected = (state.roster, state.epoch, state.attempt, adverts_digest(state.adverts), state.sharers)
        said = (statement.roster, statement.epoch, statement.attempt, statement.adverts, statement.sharers)
        if said != expected:
            _refuse("the list of survivors is for another roster, epoch, attempt, group or list of sharers")
        opening.require_threshold(len(statement.ids), self._roster, "the list of survivors")
        own = Survivor(hospital_id=self._id, upload=state.upload.sha256, complaints=state.complaints)
        if own not in statement.survivors:
            _refuse("the list of survivors does not name this hospital's upload")
        return replace(state, survivors=survivors, confirmation=sign_bytes(survivors, self._keys))

    def reveal(
        self, state: MemberState, confirmations: Mapping[str, bytes], others: Iterable[MemberState] = ()
    ) -> MemberState:
        """Reveal, for a list that at least t survivors signed, one share of every sharer. Sets `reveal`.

        What is revealed follows from the list that this hospital signed, whoever the other signers are. `others` are
        the states of other attempts that this hospital remembers: it reveals in one attempt of a round only, so that
        no two sums of a round can both be opened, whatever the centre does.

        Raises: FedmeshError(PRIVACY_REFUSED) for fewer than t signatures; (STATEMENT_INVALID) for a bad one;
            (EQUIVOCATION) when it revealed in another attempt of the round; (WRONG_STATE) before `confirm`.
        """
        self._require_mine(state)
        if not state.confirmation:
            _wrong_state("confirm", "reveal")
        if state.reveal is not None:
            return state
        at = (state.attempt.job_id, state.attempt.round)
        if any(other.reveal and (other.attempt.job_id, other.attempt.round) == at for other in others):
            raise FedmeshError(Code.EQUIVOCATION, "this hospital revealed in another attempt of the round already")
        statement = opening.check_confirmed(state.survivors, self._roster, confirmations)
        shown = []
        for name, kind in opening.allowed_kinds(statement).items():
            pair = state.shares_in.get(name)
            if pair is not None:
                share = pair.self_share if kind == "self" else pair.mask_share
                shown.append(RevealedShare(of=name, kind=kind, share=share.hex()))
        reveal = Reveal(
            attempt=state.attempt,
            survivors=hashlib.sha256(state.survivors).hexdigest(),
            sender=self._id,
            shares=tuple(shown),
        )
        return replace(state, reveal=sign(reveal, self._keys))

    def agree(self, state: MemberState, sum_sha256: str, digest: bytes, next_state_sha256: str) -> MemberState:
        """Say what the sum was and what follows from it. Sets `digest`. The caller has checked the opening and the sum.

        An opening that fits the adverts shows that t survivors revealed, so that an own reveal is not needed.

        Raises: FedmeshError(INVALID_ARGUMENT); (EQUIVOCATION); (WRONG_STATE) before `confirm`.
        """
        self._require_mine(state)
        if not state.confirmation:
            _wrong_state("confirm", "agree")
        with _arguments():
            statement = Digest(
                attempt=state.attempt,
                survivors=hashlib.sha256(state.survivors).hexdigest(),
                hospital_id=self._id,
                sum_sha256=sum_sha256,
                digest=digest.hex(),
                next_state_sha256=next_state_sha256,
            )
        if state.digest is not None:
            _require_same(statement.encode() == state.digest.statement, "digest")
            return state
        return replace(state, digest=sign(statement, self._keys))

    def _require_mine(self, state: MemberState) -> None:
        if state.roster != self._roster.sha256 or state.advert.hospital_id != self._id:
            raise FedmeshError(Code.WRONG_STATE, "this state belongs to another hospital or roster")

    def _require_self(self, names: Sequence[str], what: str) -> None:
        if self._id not in names:
            _refuse(f"{what} does not have this hospital in it")


@contextmanager
def _arguments() -> Iterator[None]:
    """Raises: FedmeshError(INVALID_ARGUMENT) when the caller's own values do not make a statement."""
    try:
        yield
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{where}: {first['msg']}") from None


def _sorted_set(names: Sequence[str], what: str) -> tuple[str, ...]:
    ordered = tuple(sorted(set(names)))
    if len(ordered) != len(names):
        _refuse(f"{what} has a hospital twice")
    return ordered


def _require_same(same: bool, what: str) -> None:
    if not same:
        raise FedmeshError(Code.EQUIVOCATION, f"this attempt was answered for another {what}: there is one answer only")


def _refuse(message: str) -> NoReturn:
    raise FedmeshError(Code.STATEMENT_INVALID, message)


def _wrong_state(needed: str, wanted: str) -> NoReturn:
    raise FedmeshError(Code.WRONG_STATE, f"this attempt cannot {wanted} before {needed}")
