"""A consortium of members for tests of the secure sum: real keys, real statements, no services."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.secure_sum import derive, masks, opening, roster, shares
from services.secure_sum.member import Member, MemberState
from services.secure_sum.opening import Opening
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.shares import SharePair
from services.secure_sum.statements import Advert, AttemptRef, Share, Signed, Survivors, adverts_digest, parse, sign
from services.secure_sum.wire import Layout

JOB = "0b3f3c5e-53a5-4f0c-9f43-1d1f3e3c1a11"
ATTEMPT = AttemptRef(job_id=JOB, round=1, attempt=1)
EPOCH = 1
MODULUS = 1 << 48
HASH = "ab" * 32

Vector = npt.NDArray[np.uint64]


def names(n: int) -> list[str]:
    return [f"hospital-{i:02d}" for i in range(1, n + 1)]


def sum_segments(layout: Layout, content: bytes) -> list[bytes]:
    """A downloaded sum, cut into its segments."""
    lengths = [layout.sum_segment_bytes(index) for index in range(layout.segments)]
    assert len(content) == sum(lengths)
    return [content[end - length : end] for length, end in zip(lengths, accumulate(lengths), strict=True)]


def make_keys(n: int) -> list[MemberKeys]:
    return [MemberKeys.generate(name) for name in names(n)]


def make_roster(keys: Sequence[MemberKeys]) -> Roster:
    statement = roster.found("consortium", [key.public() for key in keys])
    return roster.verify_founding(statement, {key.hospital_id: roster.sign_roster(statement, key) for key in keys})


@dataclass
class Consortium:
    """Members that take the steps of one attempt together; `states` is what each remembers."""

    keys: dict[str, MemberKeys]
    roster: Roster
    attempt: AttemptRef = ATTEMPT
    states: dict[str, MemberState] = field(default_factory=dict)
    inputs: dict[str, Vector] = field(default_factory=dict)
    masked: dict[str, Vector] = field(default_factory=dict)
    survivors: bytes = b""

    @classmethod
    def of(cls, n: int) -> "Consortium":
        keys = make_keys(n)
        return cls({key.hospital_id: key for key in keys}, make_roster(keys))

    def again(self, attempt: int) -> "Consortium":
        """The same members in another attempt."""
        return Consortium(self.keys, self.roster, ATTEMPT.model_copy(update={"attempt": attempt}))

    def copy(self) -> "Consortium":
        """As it stands now; what happens to one does not happen to the other."""
        copied = (dict(self.states), dict(self.inputs), dict(self.masked))
        return Consortium(self.keys, self.roster, self.attempt, *copied, self.survivors)

    def member(self, name: str) -> Member:
        return Member(self.keys[name], self.roster)

    @property
    def adverts(self) -> list[Signed]:
        return [state.advert for state in self.states.values()]

    @property
    def shares(self) -> list[Signed]:
        return [signed for state in self.states.values() for signed in state.shares_out]

    def shares_for(self, name: str, sharers: Iterable[str]) -> list[Signed]:
        group = sorted(self.states)
        return [
            self.states[sender].shares_out[[other for other in group if other != sender].index(name)]
            for sender in sharers
            if sender != name
        ]

    def begin(self, group: Iterable[str]) -> None:
        for name in group:
            self.states[name] = self.member(name).begin(self.attempt, EPOCH, list(self.keys))
            opening.check_advert(self.states[name].advert, self.roster, self.attempt, EPOCH)

    def deal(
        self, sender: str, recipient: str, pair: SharePair, committed: SharePair | None = None, **changes: object
    ) -> Signed:
        """A share that a dealer signed, whatever it holds: `pair` in the box, commitments to `committed`."""
        states, digest = self.states, adverts_digest(self.adverts)
        private = X25519PrivateKey.from_private_bytes(states[sender].transport_key)
        public = bytes.fromhex(parse(Advert, states[recipient].advert.statement).transport_key)
        context = derive.box_context(self.attempt, digest, sender, recipient)
        said = committed or pair
        statement = Share(
            attempt=self.attempt,
            adverts=digest,
            sender=sender,
            recipient=recipient,
            box=shares.seal(pair, private, public, context).hex(),
            self_commitment=derive.share_commitment(self.attempt, sender, recipient, "self", said.self_share),
            mask_commitment=derive.share_commitment(self.attempt, sender, recipient, "mask", said.mask_share),
        )
        return sign(statement.model_copy(update=changes), self.keys[sender])

    def replace_share(self, signed: Signed) -> None:
        """Put a dealer's statement in the place of its honest one."""
        share = parse(Share, signed.statement)
        others = sorted(self.states.keys() - {share.sender})
        out = list(self.states[share.sender].shares_out)
        out[others.index(share.recipient)] = signed
        self.states[share.sender] = replace(self.states[share.sender], shares_out=tuple(out))

    def share(self) -> None:
        adverts = self.adverts
        for name, state in self.states.items():
            self.states[name] = self.member(name).share(state, adverts)
            opening.check_shares(self.states[name].shares_out, self.roster, self.attempt, adverts, name)

    def receive(self, sharers: Sequence[str]) -> None:
        for name in sharers:
            received = self.shares_for(name, sharers)
            self.states[name] = self.member(name).receive(self.states[name], sharers, received)

    def upload(self, uploaders: Iterable[str], length: int = 32) -> None:
        generator = np.random.default_rng(1)
        for name in uploaders:
            member, state = self.member(name), self.states[name]
            self.inputs[name] = generator.integers(0, MODULUS, length, dtype=np.uint64)
            mask = masks.coefficients(member.mask_plan(state), 0, length)
            self.masked[name] = (self.inputs[name] + mask) % np.uint64(MODULUS)
            self.states[name] = member.commit(state, "bfv-n4096-q60-t48-v2", 1, length, HASH, [HASH])

    def confirm(self) -> dict[str, bytes]:
        sharers = self.states[next(iter(self.masked))].sharers
        uploads = {name: upload for name in self.masked if (upload := self.states[name].upload) is not None}
        self.survivors = opening.survivors_statement(self.roster, EPOCH, self.attempt, self.adverts, sharers, uploads)
        for name in uploads:
            self.states[name] = self.member(name).confirm(self.states[name], self.survivors)
            opening.check_confirmation(self.survivors, self.roster, name, self.states[name].confirmation)
        return {name: self.states[name].confirmation for name in uploads}

    def reveal(self, revealers: Iterable[str], confirmations: dict[str, bytes]) -> list[Signed]:
        reveals = []
        for name in revealers:
            self.states[name] = self.member(name).reveal(self.states[name], confirmations)
            reveal = self.states[name].reveal
            assert reveal is not None
            opening.check_reveal(reveal, self.roster, self.survivors, self.shares)
            reveals.append(reveal)
        return reveals

    def unmask(self, opened: Opening) -> Vector:
        """The sum of the survivors' masked vectors without their masks."""
        listed = parse(Survivors, self.survivors)
        keys = opening.mask_keys(self.adverts, self.roster, listed.sharers)
        plan = opening.correction(self.attempt, keys, listed.ids, opened)
        total = sum((self.masked[name] for name in listed.ids), start=np.zeros(1, dtype=np.uint64))
        return (total - masks.coefficients(plan, 0, total.size)) % np.uint64(MODULUS)

    def expected(self) -> Vector:
        listed = parse(Survivors, self.survivors)
        return sum((self.inputs[name] for name in listed.ids), start=np.zeros(1, dtype=np.uint64)) % np.uint64(MODULUS)
