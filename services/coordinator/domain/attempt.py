"""One try at one round: what is known about it, and what may stand in each phase.

Times are Unix milliseconds by the coordinator's clock. An attempt is changed only by the replica that holds the job's
lease; reports of hospitals are kept beside it and are only ever added.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Final, NamedTuple


class Phase(IntEnum):
    """The numbers of `fedmesh.coordinator.v1.Phase`. ADVERTISE, SHARE and UNMASK belong to masked sums: skipped."""

    TRAINING = 1
    ADVERTISE = 2
    SHARE = 3
    UPLOAD = 4
    UNMASK = 5
    AGREE = 6
    FINALIZE = 7
    ATTEST = 8
    COMMITTED = 9
    ABORTED = 10


class Kind(StrEnum):
    """What a hospital reports."""

    READY = "ready"
    UPLOAD = "upload"
    DIGEST = "digest"
    STATE = "state"
    VERDICT = "verdict"


ACCEPTS: Final = {
    Phase.TRAINING: Kind.READY,
    Phase.UPLOAD: Kind.UPLOAD,
    Phase.AGREE: Kind.DIGEST,
    Phase.FINALIZE: Kind.STATE,
    Phase.ATTEST: Kind.VERDICT,
}
"""The one kind of report that is taken in a phase."""

OVER: Final = frozenset({Phase.COMMITTED, Phase.ABORTED})


class AttemptId(NamedTuple):
    """One try at one round of one job."""

    job_id: str
    round: int
    attempt: int


class Contribution(NamedTuple):
    """A ciphertext in the sum."""

    hospital_id: str
    sha256: str


@dataclass(frozen=True)
class Attempt:
    """What the coordinator has decided about an attempt so far.

    cohort: all hospitals of the job, sorted; it stays the same when some decline, because thresholds and noise shares
    depend on its size. failures: attempts at this round that were given up before. spent: attempts of the whole job
    that were given up after hospitals may have sent ciphertexts. fatal: the job cannot go on after this ABORTED.
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
    failures: int = 0
    spent: int = 0
    group: tuple[str, ...] = ()
    sealed_ms: int = 0
    upload_bytes: int = 0
    contributions: tuple[Contribution, ...] = ()
    sum_sha256: str = ""
    closed_ms: int = 0
    agreeing: tuple[str, ...] = ()
    dissenting: tuple[str, ...] = ()
    agreed_ms: int = 0
    finalizer: str = ""
    tried: tuple[str, ...] = ()
    next_state_sha256: str = ""
    metrics_json: str = ""
    finalized_ms: int = 0
    attesting: tuple[str, ...] = ()
    aborted_in: Phase | None = None
    reason: str = ""
    fatal: bool = False
    ended: bool = False

    @property
    def id(self) -> AttemptId:
        return AttemptId(self.job_id, self.round, self.attempt)

    @property
    def contributors(self) -> tuple[str, ...]:
        return tuple(item.hospital_id for item in self.contributions)

    @property
    def members(self) -> tuple[str, ...]:
        """The hospitals whose report is awaited in this phase."""
        if self.phase is Phase.TRAINING:
            return () if self.group else self.cohort
        if self.phase is Phase.UPLOAD:
            return self.group
        if self.phase is Phase.AGREE:
            return self.contributors
        if self.phase is Phase.FINALIZE:
            return (self.finalizer,)
        if self.phase is Phase.ATTEST:
            return tuple(name for name in self.agreeing if name != self.finalizer)
        return ()

    @property
    def guard(self) -> str:
        """What a report of this phase must name: the version trained on, the sum decrypted, the state checked."""
        guards = {
            Phase.TRAINING: str(self.base_version),
            Phase.AGREE: self.sum_sha256,
            Phase.ATTEST: self.next_state_sha256,
        }
        return guards.get(self.phase, "")

    def sealed(self, group: tuple[str, ...], now_ms: int) -> "Attempt":
        """The group is fixed; its sum is not open yet, so the phase stays TRAINING."""
        return replace(self, group=group, sealed_ms=now_ms)

    def uploading(self, upload_bytes: int, now_ms: int, deadline_ms: int) -> "Attempt":
        return replace(self, phase=Phase.UPLOAD, phase_ms=now_ms, deadline_ms=deadline_ms, upload_bytes=upload_bytes)

    def summed(
        self, contributions: tuple[Contribution, ...], sum_sha256: str, now_ms: int, deadline_ms: int
    ) -> "Attempt":
        return replace(
            self,
            phase=Phase.AGREE,
            phase_ms=now_ms,
            deadline_ms=deadline_ms,
            contributions=contributions,
            sum_sha256=sum_sha256,
            closed_ms=now_ms,
        )

    def finalizing(
        self, agreeing: tuple[str, ...], dissenting: tuple[str, ...], finalizer: str, now_ms: int, deadline_ms: int
    ) -> "Attempt":
        """A hospital is named to compute the state; also used to name another one."""
        return replace(
            self,
            phase=Phase.FINALIZE,
            phase_ms=now_ms,
            deadline_ms=deadline_ms,
            agreeing=agreeing,
            dissenting=dissenting,
            agreed_ms=self.agreed_ms or now_ms,
            finalizer=finalizer,
            tried=(*self.tried, finalizer),
        )

    def attested_by(self, state_sha256: str, metrics_json: str, now_ms: int, deadline_ms: int) -> "Attempt":
        """The finalizer's state is there; the others check it."""
        return replace(
            self,
            phase=Phase.ATTEST,
            phase_ms=now_ms,
            deadline_ms=deadline_ms,
            next_state_sha256=state_sha256,
            metrics_json=metrics_json,
            finalized_ms=now_ms,
        )

    def committed(self, now_ms: int) -> "Attempt":
        return replace(self, phase=Phase.COMMITTED, phase_ms=now_ms, deadline_ms=now_ms)

    def aborted(self, reason: str, now_ms: int, *, fatal: bool) -> "Attempt":
        spent = self.spent + (1 if self.phase not in (Phase.TRAINING, *OVER) else 0)
        return replace(
            self,
            phase=Phase.ABORTED,
            phase_ms=now_ms,
            deadline_ms=now_ms,
            aborted_in=self.phase,
            spent=spent,
            reason=reason,
            fatal=fatal,
        )


class Upload(NamedTuple):
    sha256: str
    size_bytes: int


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
    """What hospitals have reported in the attempt, by hospital; digests are hex.

    reached_ms: when the number of reports of a kind reached what the phase needs.
    """

    ready: frozenset[str] = frozenset()
    uploads: Mapping[str, Upload] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, State] = field(default_factory=dict)
    verdicts: Mapping[str, Verdict] = field(default_factory=dict)
    reached_ms: Mapping[Kind, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Surroundings:
    """What is true around an attempt. absent_ms: for how long each disconnected hospital has been away."""

    now_ms: int
    absent_ms: Mapping[str, int] = field(default_factory=dict)
    declined: Mapping[str, Decline] = field(default_factory=dict)
