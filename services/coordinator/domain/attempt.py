"""One try at one round: what is known about it, and what may stand in each phase.

Times are Unix milliseconds by the coordinator's clock. An attempt is changed only by the replica that holds the job's
lease; reports of hospitals are kept beside it and are only ever added.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple

from services.secure_sum.cohort import threshold


class Phase(IntEnum):
    """The numbers of `fedmesh.coordinator.v1.Phase`."""

    TRAINING = 1
    SHARE = 3
    UPLOAD = 4
    UNMASK = 5
    AGREE = 6
    FINALIZE = 7
    ATTEST = 8
    COMMITTED = 9
    ABORTED = 10
    CONFIRM = 11
    BURNT = 12


class Kind(StrEnum):
    """What a hospital reports."""

    READY = "ready"
    SHARES = "shares"
    UPLOAD = "upload"
    CONFIRMATION = "confirmation"
    REVEAL = "reveal"
    DIGEST = "digest"
    STATE = "state"
    VERDICT = "verdict"


ACCEPTS: Final = {
    Phase.TRAINING: Kind.READY,
    Phase.SHARE: Kind.SHARES,
    Phase.UPLOAD: Kind.UPLOAD,
    Phase.CONFIRM: Kind.CONFIRMATION,
    Phase.UNMASK: Kind.REVEAL,
    Phase.AGREE: Kind.DIGEST,
    Phase.FINALIZE: Kind.STATE,
    Phase.ATTEST: Kind.VERDICT,
}
"""The one kind of report that is taken in a phase, in the order of the phases."""

OVER: Final = frozenset({Phase.COMMITTED, Phase.ABORTED, Phase.BURNT})


class AttemptId(NamedTuple):
    """One try at one round of one job."""

    job_id: str
    round: int
    attempt: int


class Contribution(NamedTuple):
    """A ciphertext in the sum."""

    hospital_id: str
    sha256: str


class Counted(NamedTuple):
    """What the aggregator counted: a ciphertext and the SHA-256 of the `upload` statement that came with it."""

    hospital_id: str
    sha256: str
    upload_sha256: str


@dataclass(frozen=True)
class Agreement:
    """What hospitals made of a sum. stating: those of the agreeing who computed the state `state_sha256`."""

    agreeing: tuple[str, ...] = ()
    dissenting: tuple[str, ...] = ()
    state_sha256: str = ""
    stating: tuple[str, ...] = ()


@dataclass(frozen=True)
class Attempt:
    """What the coordinator has decided about an attempt so far.

    cohort: all hospitals of the job, sorted, members of the roster; it stays the same when some decline.
    roster_size: n, from which all thresholds follow. failures: attempts at this round that were given up before.
    spent: attempts of the whole job that were given up after hospitals may have sent ciphertexts.
    enough: so many ready hospitals seal the group at once, 0 for all; oldest: the greatest age of a contribution, which
    is the number of versions made since the one it was trained on; ages: of the group's contributions, in its order.
    survivors: the statement. unopened: with how many reveals the masks could not be opened; `trouble` is why.
    returned: how often the attempt was rebuilt from the registry. fatal: the job cannot go on after this ABORTED.
    """

    job_id: str
    round: int
    attempt: int
    plan_id: str
    base_version: int
    base_state_sha256: str
    cohort: tuple[str, ...]
    phase: Phase
    phase_ms: int
    deadline_ms: int
    roster_sha256: str = ""
    roster_size: int = 0
    epoch: int = 0
    failures: int = 0
    spent: int = 0
    enough: int = 0
    oldest: int = 0
    group: tuple[str, ...] = ()
    ages: tuple[int, ...] = ()
    adverts_sha256: str = ""
    sealed_ms: int = 0
    sharers: tuple[str, ...] = ()
    shared_ms: int = 0
    upload_bytes: int = 0
    contributions: tuple[Contribution, ...] = ()
    survivors: str = ""
    confirming: tuple[str, ...] = ()
    confirmed_ms: int = 0
    unopened: int = 0
    trouble: str = ""
    returned: int = 0
    revealing: tuple[str, ...] = ()
    sum_sha256: str = ""
    summed_ms: int = 0
    agreement: Agreement = field(default_factory=Agreement)
    agreed_ms: int = 0
    finalizer: str = ""
    tried: tuple[str, ...] = ()
    next_state_sha256: str = ""
    metrics_json: str = ""
    finalized_ms: int = 0
    attesting: tuple[str, ...] = ()
    ended_in: Phase | None = None
    reason: str = ""
    fatal: bool = False
    ended: bool = False

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.job_id, self.round, self.attempt)

    @property
    def needed(self) -> int:
        """t, the quorum of every phase."""
        return threshold(self.roster_size)

    def age(self, hospital_id: str) -> int:
        """Of the contribution of a hospital of the group. The release before knew no ages: all were 0."""
        return dict(zip(self.group, self.ages, strict=False)).get(hospital_id, 0)

    @property
    def survivor_ids(self) -> tuple[str, ...]:
        return tuple(item.hospital_id for item in self.contributions)

    @property
    def survivors_sha256(self) -> str:
        return hashlib.sha256(self.survivors.encode()).hexdigest() if self.survivors else ""

    @property
    def bound(self) -> bool:
        """The registry holds the survivors: the attempt may only complete, or burn its version."""
        return bool(self.confirming)

    @property
    def members(self) -> tuple[str, ...]:
        """The hospitals whose report is awaited in this phase."""
        if self.phase is Phase.TRAINING:
            return self.cohort
        if self.phase is Phase.SHARE:
            return () if self.sharers else self.group
        if self.phase is Phase.UPLOAD:
            return self.survivor_ids if self.bound else self.sharers
        if self.phase in (Phase.CONFIRM, Phase.UNMASK, Phase.AGREE):
            return self.survivor_ids
        if self.phase is Phase.FINALIZE:
            return (self.finalizer,)
        if self.phase is Phase.ATTEST:
            return tuple(name for name in self.agreement.agreeing if name != self.finalizer)
        return ()

    @property
    def guard(self) -> str:
        """What a report of this phase must name: the version trained on, the group, the list, the sum, the state."""
        guards = {
            Phase.TRAINING: str(self.base_version),
            Phase.SHARE: self.adverts_sha256,
            Phase.UPLOAD: self.adverts_sha256,
            Phase.CONFIRM: self.survivors_sha256,
            Phase.UNMASK: self.survivors_sha256,
            Phase.AGREE: self.sum_sha256,
            Phase.ATTEST: self.next_state_sha256,
        }
        return guards.get(self.phase, "")

    def _entering(self, phase: Phase, now_ms: int, deadline_ms: int) -> "Attempt":
        return replace(self, phase=phase, phase_ms=now_ms, deadline_ms=deadline_ms)

    def sealed(self, ages: Mapping[str, int], adverts_sha256: str, now_ms: int, deadline_ms: int) -> "Attempt":
        """The group is fixed; it shares its mask secrets. ages: of its contributions, by hospital."""
        entered = self._entering(Phase.SHARE, now_ms, deadline_ms)
        group = tuple(sorted(ages))
        in_order = tuple(ages[name] for name in group)
        return replace(entered, group=group, ages=in_order, adverts_sha256=adverts_sha256, sealed_ms=now_ms)

    def shared(self, sharers: tuple[str, ...], now_ms: int) -> "Attempt":
        """The sharers are fixed; their sum is not open yet, so the phase stays SHARE."""
        return replace(self, sharers=sharers, shared_ms=now_ms)

    def uploading(self, upload_bytes: int, now_ms: int, deadline_ms: int) -> "Attempt":
        return replace(self._entering(Phase.UPLOAD, now_ms, deadline_ms), upload_bytes=upload_bytes)

    def listed(
        self, contributions: tuple[Contribution, ...], survivors: str, now_ms: int, deadline_ms: int
    ) -> "Attempt":
        """The uploads are closed; the survivors sign the list of them."""
        entered = self._entering(Phase.CONFIRM, now_ms, deadline_ms)
        return replace(entered, contributions=contributions, survivors=survivors)

    def confirmed(self, confirming: tuple[str, ...], now_ms: int, deadline_ms: int) -> "Attempt":
        """The list is stored: nothing may abort from here on."""
        entered = self._entering(Phase.UNMASK, now_ms, deadline_ms)
        return replace(entered, confirming=confirming, confirmed_ms=self.confirmed_ms or now_ms)

    def stuck(self, reveals: int, trouble: str) -> "Attempt":
        """So many reveals did not open the masks."""
        return replace(self, unopened=reveals, trouble=trouble)

    def summed(
        self, revealing: tuple[str, ...], sum_sha256: str, finalizer: str, now_ms: int, deadline_ms: int
    ) -> "Attempt":
        """The masks are off; the survivors agree on the sum, and one of them stores the state that follows."""
        return replace(
            self._entering(Phase.AGREE, now_ms, deadline_ms),
            revealing=revealing,
            sum_sha256=sum_sha256,
            summed_ms=now_ms,
            finalizer=finalizer,
            tried=(finalizer,),
        )

    def agreed(self, agreement: Agreement, now_ms: int) -> "Attempt":
        return replace(self, agreement=agreement, agreed_ms=self.agreed_ms or now_ms)

    def finalizing(self, finalizer: str, now_ms: int, deadline_ms: int) -> "Attempt":
        """Another hospital is named to store the state."""
        entered = self._entering(Phase.FINALIZE, now_ms, deadline_ms)
        return replace(entered, finalizer=finalizer, tried=(*self.tried, finalizer))

    def stated(self, state_sha256: str, metrics_json: str, now_ms: int) -> "Attempt":
        """The finalizer's state is there."""
        return replace(self, next_state_sha256=state_sha256, metrics_json=metrics_json, finalized_ms=now_ms)

    def attested_by(self, state_sha256: str, metrics_json: str, now_ms: int, deadline_ms: int) -> "Attempt":
        """The finalizer's state is there; the others check it."""
        return self._entering(Phase.ATTEST, now_ms, deadline_ms).stated(state_sha256, metrics_json, now_ms)

    def committed(self, now_ms: int) -> "Attempt":
        return self._entering(Phase.COMMITTED, now_ms, now_ms)

    def burnt(self, reason: str, now_ms: int) -> "Attempt":
        """The version is used up without a new state."""
        entered = self._entering(Phase.BURNT, now_ms, now_ms)
        return replace(entered, ended_in=self.phase, reason=reason)

    def aborted(self, reason: str, now_ms: int, *, fatal: bool) -> "Attempt":
        """Given up. From UPLOAD on hospitals may have sent something, and then the attempt counts as spent."""
        spent = self.spent + (0 if self.phase in (Phase.TRAINING, Phase.SHARE, *OVER) else 1)
        entered = self._entering(Phase.ABORTED, now_ms, now_ms)
        return replace(entered, ended_in=self.phase, spent=spent, reason=reason, fatal=fatal)


class Upload(NamedTuple):
    sha256: str
    size_bytes: int


class Seen(NamedTuple):
    """What a hospital saw in the sum and made of it; digests are hex. The finalizer's metrics count."""

    digest: str
    next_state_sha256: str
    metrics_json: str


class State(NamedTuple):
    sha256: str
    metrics_json: str


class Verdict(NamedTuple):
    agrees: bool
    reason: str


class Decline(NamedTuple):
    code: str
    reason: str


@dataclass(frozen=True)
class Reports:
    """What hospitals have reported in the attempt, by hospital. The statements themselves are kept elsewhere.

    reached_ms: when the number of reports of a kind reached what the phase needs.
    """

    ready: frozenset[str] = frozenset()
    shares: frozenset[str] = frozenset()
    uploads: Mapping[str, Upload] = field(default_factory=dict)
    confirmations: frozenset[str] = frozenset()
    reveals: frozenset[str] = frozenset()
    digests: Mapping[str, Seen] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    reached_ms: Mapping[Kind, int] = field(default_factory=dict)


GONE_MS: Final = 1 << 48
"""Absent for ever: a suspended hospital."""


@dataclass(frozen=True)
class Surroundings:
    """What is true around an attempt. absent_ms: for how long each disconnected hospital has been away."""

    now_ms: int
    absent_ms: Mapping[str, int] = field(default_factory=dict)
    declined: Mapping[str, Decline] = field(default_factory=dict)
