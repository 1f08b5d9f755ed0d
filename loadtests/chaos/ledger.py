"""What is compared after a run: what was acknowledged, and what is stored. Pure; see `reading` for where it comes from.

An acknowledgement is believed wherever it was seen: by the load, by a hospital's own database, by the probe. What is
not stored, or stored otherwise, is lost; what is stored twice is doubled.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from services.secure_sum.cohort import threshold

Round = tuple[str, int]
"""Job and version, which is the number of its round."""
_SHOWN: Final = 20


@dataclass(frozen=True)
class Committed:
    """A committed round. contributions: SHA-256 of the ciphertext by hospital."""

    attempt: int
    sum_sha256: str
    burnt: bool
    contributions: Mapping[str, str]


@dataclass(frozen=True)
class Hospital:
    """What a hospital's own databases say.

    ciphertexts: what it sent, by (job, round, attempt). revealed: attempts in which it gave shares, which it does only
    for survivors that the registry has. sums: digests of what it decrypted, by round. ledger: SHA-256 of the entries of
    its privacy ledger in order.
    """

    ciphertexts: Mapping[tuple[str, int, int], str]
    revealed: frozenset[tuple[str, int, int]]
    sums: Mapping[int, str]
    ledger: tuple[str, ...]


@dataclass(frozen=True)
class Truth:
    """What was acknowledged. appended: index in the log by event. rounds: as the registry told them during the run."""

    appended: Mapping[str, int] = field(default_factory=dict)
    recorded: frozenset[str] = frozenset()
    plans: frozenset[str] = frozenset()
    rounds: Mapping[Round, Committed] = field(default_factory=dict)
    rows: frozenset[int] = frozenset()
    hospitals: Mapping[str, Hospital] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """What the stores hold. entries: (index, event, type, subject round or None) of the audit log.

    survivors: the attempt and its survivors, by job and round. ledgers: SHA-256 of the entries in order, and the kinds
    of charges with how often each is there.
    """

    entries: tuple[tuple[int, str, str, Round | None], ...] = ()
    plans: tuple[str, ...] = ()
    rounds: Mapping[Round, Committed] = field(default_factory=dict)
    survivors: Mapping[Round, tuple[int, frozenset[str]]] = field(default_factory=dict)
    ledgers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    charges: Mapping[tuple[str, str, int, int], int] = field(default_factory=dict)
    rows: frozenset[int] = frozenset()
    outbox_waiting: int = 0
    log_wrong: int = 0


@dataclass
class Findings:
    """What does not agree: in words, the first ones of each kind, and how many altogether."""

    lost: int = 0
    doubled: int = 0
    inexact: int = 0
    notes: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    def lose(self, what: str) -> None:
        self.lost += 1
        self._note(f"lost: {what}", self.lost)

    def double(self, what: str) -> None:
        self.doubled += 1
        self._note(f"doubled: {what}", self.doubled)

    def wrong(self, what: str) -> None:
        self.inexact += 1
        self._note(f"wrong: {what}", self.inexact)

    def _note(self, text: str, count: int) -> None:
        if count <= _SHOWN:
            self.notes.append(text)


def compare(truth: Truth, stored: Stored, expected: Mapping[Round, str]) -> Findings:
    """Hold what is stored against what was acknowledged. expected: digests of the exact sums of rounds' survivors."""
    findings = Findings()
    _compare_log(truth, stored, findings)
    _compare_rounds(truth, stored, findings)
    _compare_ledgers(truth, stored, findings)
    _compare_sums(truth, stored, expected, findings)
    for plan in truth.plans - set(stored.plans):
        findings.lose(f"plan {plan}")
    for number in sorted(truth.rows - stored.rows):
        findings.lose(f"row {number} of the probe")
    findings.checked |= {
        "audit entries acknowledged": len(truth.appended) + len(truth.recorded),
        "audit entries stored": len(stored.entries),
        "plans": len(truth.plans),
        "rounds": len(stored.rounds),
        "contributions": sum(len(found.contributions) for found in stored.rounds.values()),
        "ledger entries": sum(map(len, stored.ledgers.values())),
        "rows of the probe": len(truth.rows),
    }
    return findings


def counted(stored: Stored) -> dict[Round, Round]:
    """Rounds with survivors, and what hospitals call them: they count states, and a burnt version makes none.

    A burnt version is counted as the state that it would have made, as the next one is.
    """
    burnt = [key for key, found in stored.rounds.items() if found.burnt]
    return {
        (job, version): (job, version - sum(1 for other, before in burnt if other == job and before < version))
        for job, version in stored.survivors
    }


def _compare_log(truth: Truth, stored: Stored, findings: Findings) -> None:
    places = {event: index for index, event, _, _ in stored.entries}
    for event, count in Counter(event for _, event, _, _ in stored.entries).items():
        if count > 1:
            findings.double(f"audit entry of event {event}, {count} times")
    for event, index in truth.appended.items():
        if places.get(event) != index:
            findings.lose(f"audit entry {index}, event {event}, which is at {places.get(event)}")
    for event in truth.recorded - set(places):
        findings.lose(f"audit entry of event {event}, which the registry took")
    if [index for index, _, _, _ in stored.entries] != list(range(len(stored.entries))):
        findings.lose("audit entries in the middle of the log")
    if stored.outbox_waiting:
        findings.wrong(f"{stored.outbox_waiting} events of the outbox never reached the log")
    if stored.log_wrong:
        findings.wrong(f"the audit log does not verify: {stored.log_wrong} problems")


def _compare_rounds(truth: Truth, stored: Stored, findings: Findings) -> None:
    for key, seen in truth.rounds.items():
        if stored.rounds.get(key) != seen:
            findings.lose(f"round {key[1]} of job {key[0]} as it was committed")
    told = Counter(key for _, _, kind, key in stored.entries if kind in ("round.committed", "round.burnt"))
    used: Counter[tuple[str, str]] = Counter()
    for (job, version), found in stored.rounds.items():
        if told[(job, version)] != 1:
            (findings.double if told[(job, version)] else findings.lose)(f"audit entry of round {version} of job {job}")
        used.update(found.contributions.items())
        _compare_survivors((job, version), found, stored, truth, findings)
    for (hospital, sha256), count in used.items():
        if count > 1:
            findings.double(f"contribution {sha256} of {hospital}, in {count} rounds")
    for name, hospital_truth in truth.hospitals.items():
        for job, version, attempt in hospital_truth.revealed:
            if stored.survivors.get((job, version), (None,))[0] != attempt:
                findings.lose(f"survivors of round {version}, attempt {attempt} of job {job}, for whom {name} revealed")


def _compare_survivors(key: Round, found: Committed, stored: Stored, truth: Truth, findings: Findings) -> None:
    job, version = key
    accepted = stored.survivors.get(key)
    if found.burnt:
        return
    if accepted is None or accepted != (found.attempt, frozenset(found.contributions)):
        findings.lose(f"accepted contributions of round {version} of job {job}: {accepted} against {found}")
    for name, sha256 in found.contributions.items():
        own = truth.hospitals.get(name)
        if own is not None and own.ciphertexts.get((job, version, found.attempt)) != sha256:
            findings.wrong(f"contribution of {name} to round {version} of job {job} is not what it sent")


def _compare_ledgers(truth: Truth, stored: Stored, findings: Findings) -> None:
    for name, own in truth.hospitals.items():
        copy = stored.ledgers.get(name, ())
        if copy != own.ledger:
            same = sum(1 for one, other in zip(copy, own.ledger, strict=False) if one == other)
            findings.lose(f"ledger of {name}: it has {len(own.ledger)} entries, the registry {len(copy)}, {same} agree")
    for charge, count in stored.charges.items():
        if count > 1:
            findings.double(f"charge {charge}, {count} times")


def _compare_sums(truth: Truth, stored: Stored, expected: Mapping[Round, str], findings: Findings) -> None:
    """Every sum that a hospital decrypted is that of a round's survivors, and t hospitals have each committed one's.

    A hospital's notes do not say the job. The round that the end of the run interrupted may be with a few hospitals; so
    may the sum of a burnt version, with those that had opened it and came too late for the sum of the next.
    """
    exact: dict[int, set[str]] = {}
    agreed: dict[int, set[str]] = {}
    for key, (_, state) in counted(stored).items():
        digest = expected.get(key, "")
        exact.setdefault(state, set()).add(digest)
        if key in stored.rounds and not stored.rounds[key].burnt:
            agreed.setdefault(state, set()).add(digest)
    for name, own in truth.hospitals.items():
        for state, digest in own.sums.items():
            if digest not in exact.get(state, ()):
                findings.wrong(f"the sum that {name} decrypted in round {state}")
    needed = threshold(len(truth.hospitals)) if truth.hospitals else 0
    for state, digests in sorted(agreed.items()):
        have = sum(1 for own in truth.hospitals.values() if own.sums.get(state) in digests)
        if have < needed:
            findings.wrong(f"only {have} hospitals hold the sum of round {state}, {needed} agreed to it")


def rounds_of(rows: Iterable[list[object]]) -> dict[Round, Committed]:
    """The rounds that the load noted: (time, job, version, attempt, sum, burnt, contributions) each."""
    found = {}
    for _, job, version, attempt, sum_sha256, burnt, contributions in rows:
        assert isinstance(version, int)
        assert isinstance(attempt, int)
        assert isinstance(contributions, dict)
        found[(str(job), version)] = Committed(attempt, str(sum_sha256), bool(burnt), contributions)
    return found
