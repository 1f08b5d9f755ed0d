"""Everything that the coalition can compute from what it holds, saw and was told."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from services.common.errors import FedmeshError
from services.secure_sum import derive, shares, statements
from services.secure_sum.derive import MaskPlan, ShareKind
from services.secure_sum.roster import Roster
from services.secure_sum.statements import Advert, AttemptRef, Reveal, Share, Signed
from tests.simulation.arithmetic import RING, Integers, Plain

Secret = tuple[AttemptRef, str, ShareKind]
KINDS: tuple[ShareKind, ShareKind] = ("self", "mask")


@dataclass(frozen=True)
class Residue:
    """An upload without the masks that the coalition can compute."""

    hospital: str
    values: Integers
    """Mod 2^48."""
    bare: bool
    """True: no mask is left that the coalition knows of."""


class Knowledge:
    """Shares and seeds, collected over all attempts; never asks who an adversary may be."""

    def __init__(self, roster: Roster, plain: Plain, self_masks: bool = True, pair_masks: bool = True) -> None:
        self.roster = roster
        self._self_masks, self._pair_masks = self_masks, pair_masks
        self._plain = plain
        self._shares: dict[Secret, dict[int, bytes]] = {}
        self._seeds: dict[Secret, list[bytes]] = {}
        self._cache: dict[tuple[AttemptRef, str, ShareKind, int], bytes] = {}
        self.adverts: dict[tuple[AttemptRef, str], Advert] = {}
        self.uploads: dict[tuple[AttemptRef, str], Integers] = {}
        self.sharers: dict[tuple[AttemptRef, str], tuple[str, ...]] = {}
        """Which sharers an uploader was told of."""
        self.told: dict[tuple[AttemptRef, str], dict[str, Advert]] = {}
        """Which adverts a hospital was given, where that differs from `adverts`."""
        self.private: dict[bytes, X25519PrivateKey] = {}
        """Private halves that the coalition has, by public key."""

    # --- collecting

    def own_seed(self, attempt: AttemptRef, of: str, kind: ShareKind, seed: bytes) -> None:
        self._seeds.setdefault((attempt, of, kind), []).append(seed)
        if kind == "mask":
            self.own_key(derive.mask_key_pair(seed))

    def own_key(self, private: X25519PrivateKey) -> None:
        self.private[private.public_key().public_bytes_raw()] = private

    def share(self, attempt: AttemptRef, of: str, kind: ShareKind, holder: str, share: bytes) -> None:
        self._shares.setdefault((attempt, of, kind), {})[self.roster.position(holder)] = share

    def revealed(self, signed: Signed) -> None:
        reveal = statements.parse(Reveal, signed.statement)
        for item in reveal.shares:
            self.share(reveal.attempt, item.of, item.kind, reveal.sender, bytes.fromhex(item.share))

    def sealed(self, signed: Iterable[Signed]) -> None:
        """Open whatever boxes the coalition has a key for."""
        for one in signed:
            said = statements.parse(Share, one.statement)
            sender = self._advert(said.attempt, said.sender)
            recipient = self._seen_by(said.sender, said.attempt, said.recipient)
            if sender is None or recipient is None:
                continue
            context = derive.box_context(said.attempt, said.adverts, said.sender, said.recipient)
            private = self.private.get(bytes.fromhex(recipient.transport_key))
            if private is None:
                continue
            pair = shares.open_box(bytes.fromhex(said.box), private, bytes.fromhex(sender.transport_key), context)
            if pair is not None:
                self.share(said.attempt, said.sender, "self", said.recipient, pair.self_share)
                self.share(said.attempt, said.sender, "mask", said.recipient, pair.mask_share)

    def uploaded(self, attempt: AttemptRef, hospital: str, values: Integers, sharers: Sequence[str]) -> None:
        self.uploads[attempt, hospital] = tuple(v % RING for v in values)
        self.sharers[attempt, hospital] = tuple(sharers)

    # --- concluding

    def seeds(self, attempt: AttemptRef, of: str, kind: ShareKind) -> list[bytes]:
        """Known, or put together from t shares, in this attempt or any other; fits the advert where there is one."""
        found = []
        for owner, known in self._seeds.items():
            if owner[1:] == (of, kind):
                found.extend(known)
        for owner, held in self._shares.items():
            if owner[1:] == (of, kind) and len(held) >= self.roster.threshold:
                found.append(self._combined(owner, len(held)))
        advert = self._advert(attempt, of)
        return [seed for seed in found if advert is None or _fits(advert, attempt, of, kind, seed)]

    def _combined(self, owner: Secret, number: int) -> bytes:
        key = (*owner, number)
        if key not in self._cache:
            self._cache[key] = shares.combine(self._shares[owner], self.roster.threshold)
        return self._cache[key]

    def residue(self, attempt: AttemptRef, hospital: str) -> Residue:
        """Take every mask off an upload whose key the coalition can compute."""
        plan: list[tuple[bytes, int]] = []
        bare = True
        if self._self_masks:
            seeds = self.seeds(attempt, hospital, "self")
            bare = bool(seeds)
            plan += [(derive.self_key(seed, attempt, hospital), 1) for seed in seeds[:1]]
        peers = self.sharers[attempt, hospital] if self._pair_masks else ()
        for peer in peers:
            if peer != hospital:
                pair = self._pair(attempt, hospital, peer)
                bare = bare and pair is not None
                if pair is not None:
                    before = self.roster.position(hospital) < self.roster.position(peer)
                    plan.append((pair, 1 if before else -1))
        return Residue(hospital, self.take_off(self.uploads[attempt, hospital], tuple(plan)), bare)

    def take_off(self, values: Integers, plan: MaskPlan) -> Integers:
        return tuple((v - m) % RING for v, m in zip(values, self._plain.expand(plan), strict=True))

    def _pair(self, attempt: AttemptRef, a: str, b: str) -> bytes | None:
        mine, theirs = self._advert(attempt, a), self._seen_by(a, attempt, b)
        if mine is None or theirs is None:
            return None
        for owner, other in ((mine, theirs), (theirs, mine)):
            for private in self._mask_keys(attempt, owner):
                try:
                    return derive.pair_key(private, bytes.fromhex(other.mask_key), attempt, a, b)
                except FedmeshError:
                    continue
        return None

    def _mask_keys(self, attempt: AttemptRef, advert: Advert) -> Iterator[X25519PrivateKey]:
        public = bytes.fromhex(advert.mask_key)
        if public in self.private:
            yield self.private[public]
        for seed in self.seeds(attempt, advert.hospital_id, "mask"):
            private = derive.mask_key_pair(seed)
            if private.public_key().public_bytes_raw() == public:
                yield private

    def _advert(self, attempt: AttemptRef, hospital: str) -> Advert | None:
        return self.adverts.get((attempt, hospital))

    def _seen_by(self, viewer: str, attempt: AttemptRef, hospital: str) -> Advert | None:
        return self.told.get((attempt, viewer), {}).get(hospital) or self._advert(attempt, hospital)


def _fits(advert: Advert, attempt: AttemptRef, of: str, kind: ShareKind, seed: bytes) -> bool:
    if kind == "self":
        return derive.seed_commitment(attempt, of, seed) == advert.seed_commitment
    return derive.mask_key_pair(seed).public_key().public_bytes_raw().hex() == advert.mask_key


def subsets(names: Sequence[str], most: int) -> Iterator[tuple[str, ...]]:
    """Non-empty subsets of at most `most` names."""
    for size in range(1, min(most, len(names)) + 1):
        yield from combinations(names, size)
