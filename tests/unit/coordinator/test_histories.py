"""The state machine under random histories of reports, absences, refusals and time."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from services.coordinator.domain import machine
from services.coordinator.domain.attempt import (
    ACCEPTS,
    Attempt,
    Contribution,
    Kind,
    Phase,
    Reports,
    Seen,
    State,
    Surroundings,
    Upload,
    Verdict,
)
from services.coordinator.domain.machine import decide
from services.coordinator.domain.stored import parse_attempt, report_value
from services.coordinator.store.codec import parse_reports, record_fields
from tests.support.attempts import LIST, OTHER_STATE, RULES, SHA256, STATE, at, training


@st.composite
def steps(draw: st.DrawFn) -> list[tuple[str, int, int]]:
    kind = st.sampled_from(["answer"] * 5 + ["everyone", "leave", "return", "decline", "time", "lie"])
    return draw(st.lists(st.tuples(kind, st.integers(0, 15), st.integers(1, 40_000)), max_size=150))


class World:
    """An attempt with hospitals around it, driven as the runner drives it."""

    def __init__(self, n: int, enough: int = 0) -> None:
        self.now = 0
        self.attempt = training(n, enough=enough, oldest=3 if enough else 0)
        self.reports = Reports()
        self.absent_since: dict[str, int] = {}
        self.declined: set[str] = set()
        self.trail = [Phase.TRAINING]

    def around(self) -> Surroundings:
        absent = {name: self.now - since for name, since in self.absent_since.items()}
        return at(self.now, absent, tuple(self.declined))

    def answer(self, name: str, *, lie: bool) -> None:
        kind = ACCEPTS.get(self.attempt.phase)
        if kind is None or name not in self.attempt.members or name in self.declined or name in self.absent_since:
            return
        r = self.reports
        name_set = {
            Kind.READY: "ready",
            Kind.SHARES: "shares",
            Kind.CONFIRMATION: "confirmations",
            Kind.REVEAL: "reveals",
        }.get(kind)
        if name_set is not None:
            self.reports = replace(r, **{name_set: getattr(r, name_set) | {name}})
        elif kind is Kind.UPLOAD:
            self.reports = replace(r, uploads={**r.uploads, name: Upload(SHA256, 10)})
        elif kind is Kind.DIGEST:
            # A liar lies about the sum, or only about the state.
            told = Seen("d", STATE, "") if not lie else Seen("x" if self.now % 2 else "d", OTHER_STATE, "")
            self.reports = replace(r, digests={**r.digests, name: told})
        elif kind is Kind.STATE:
            self.reports = replace(r, states={**r.states, name: State(OTHER_STATE if lie else STATE, "")})
        else:
            verdict = Verdict(not lie, "another state" if lie else "")
            self.reports = replace(r, verdicts={**r.verdicts, name: verdict})
        held = {Kind.DIGEST: self.reports.digests, Kind.VERDICT: self.reports.verdicts}.get(kind, {})
        if len(held) == machine.quorum(self.attempt):
            self.reports = replace(self.reports, reached_ms={**self.reports.reached_ms, kind: self.now})

    def settle(self) -> machine.Decision:
        """Act until there is nothing to do now; the last decision."""
        for _ in range(100):
            decision = decide(self.attempt, self.reports, self.around(), RULES)
            if isinstance(decision, machine.Wait | machine.Reopen | machine.EndJob):
                return decision
            self.check(decision)
            self.attempt = self.apply(decision)
            self.trail.append(self.attempt.phase)
        raise AssertionError("the machine does not come to rest")

    def check(self, decision: machine.Decision) -> None:
        """What must hold whatever the history was."""
        needed = self.attempt.needed
        reports = self.reports
        if isinstance(decision, machine.Abort):
            # Nothing aborts once the survivors are stored, but a dispute, which stops the job.
            assert not self.attempt.bound or (decision.fatal and self.attempt.phase is Phase.ATTEST)
            assert 0 < len(decision.reason) <= machine.REASON_LENGTH
        elif isinstance(decision, machine.Burn):
            assert self.attempt.bound
            assert 0 < len(decision.reason) <= machine.REASON_LENGTH
        elif isinstance(decision, machine.Seal):
            assert len(decision.group) >= needed
            assert set(decision.group) <= reports.ready
            # In asynchronous rounds a group below K is what was left when waiting was over.
            early = len(decision.group) < self.attempt.enough and self.now < self.attempt.deadline_ms
            pending = set(self.attempt.cohort) - reports.ready - self.declined
            assert not early or all(name in self.absent_since for name in pending)
        elif isinstance(decision, machine.FixSharers):
            assert len(decision.sharers) >= needed
            assert set(decision.sharers) <= reports.shares & set(self.attempt.group)
        elif isinstance(decision, machine.CloseSum):
            assert len(reports.uploads) >= needed
        elif isinstance(decision, machine.StoreSurvivors):
            assert len(decision.confirming) >= needed
            assert set(decision.confirming) <= reports.confirmations
        elif isinstance(decision, machine.OpenMasks):
            assert len(decision.revealing) >= needed
            assert set(decision.revealing) <= reports.reveals
        else:
            self.check_agreement(decision)

    def check_agreement(self, decision: machine.Decision) -> None:
        needed, attempt = self.attempt.needed, self.attempt
        if not isinstance(decision, machine.Finalize | machine.Attest | machine.Commit):
            return
        agreement = decision.agreement
        assert len(agreement.agreeing) >= needed
        assert len({self.reports.digests[name].digest for name in agreement.agreeing}) == 1
        assert not set(agreement.agreeing) & set(agreement.dissenting)
        if isinstance(decision, machine.Finalize):
            assert decision.finalizer in agreement.agreeing
            assert decision.finalizer not in attempt.tried
        elif isinstance(decision, machine.Commit):
            assert len(decision.attesting) >= needed
            assert set(decision.attesting) <= set(agreement.agreeing)
            assert attempt.finalizer in decision.attesting
            assert all(verdict.agrees for verdict in self.reports.verdicts.values())

    def apply(self, decision: machine.Decision) -> Attempt:
        attempt, now, ends = self.attempt, self.now, self.now + RULES.phase_ms
        match decision:
            case machine.Seal(group):
                return attempt.sealed(dict.fromkeys(group, 0), SHA256, now, ends)
            case machine.FixSharers(sharers):
                return attempt.shared(sharers, now)
            case machine.OpenSum():
                return attempt.uploading(100, now, ends)
            case machine.CloseSum():
                contributions = tuple(Contribution(name, SHA256) for name in sorted(self.reports.uploads))
                return attempt.listed(contributions, LIST, now, ends)
            case machine.StoreSurvivors(confirming):
                return attempt.confirmed(confirming, now, ends)
            case machine.OpenMasks(revealing):
                if self.now % 7 == 0:
                    return attempt.stuck(len(revealing), "a seed does not fit")
                finalizer = machine.first_finalizer(attempt, self.around(), RULES)
                return attempt.summed(revealing, SHA256, finalizer, now, ends)
            case machine.Finalize(agreement, finalizer):
                return attempt.agreed(agreement, now).finalizing(finalizer, now, ends)
            case machine.Attest(agreement, sha256, metrics_json):
                return attempt.agreed(agreement, now).attested_by(sha256, metrics_json, now, ends)
            case machine.Commit(agreement):
                return attempt.agreed(agreement, now).committed(now)
            case machine.Abort(reason, fatal):
                return attempt.aborted(reason, now, fatal=fatal)
            case machine.Burn(reason):
                return attempt.burnt(reason, now)
        raise AssertionError(decision)


ORDER = [*ACCEPTS, Phase.COMMITTED]


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 16), st.integers(0, 16), steps())
def test_every_history_ends_with_a_quorum_an_abort_or_a_burnt_version(
    n: int, enough: int, history: list[tuple[str, int, int]]
) -> None:
    world = World(n, enough)
    for kind, number, milliseconds in history:
        name = world.attempt.cohort[number % n]
        if kind in ("answer", "lie"):
            world.answer(name, lie=kind == "lie")
        elif kind == "everyone":
            for other in world.attempt.members:
                world.answer(other, lie=False)
        elif kind == "leave":
            world.absent_since.setdefault(name, world.now)
        elif kind == "return":
            world.absent_since.pop(name, None)
        elif kind == "decline":
            world.declined.add(name)
        else:
            world.now += milliseconds
        decision = world.settle()
        if isinstance(decision, machine.Wait):
            assert decision.until_ms > world.now
            assert decision.until_ms <= world.attempt.deadline_ms
    # Time alone ends every attempt: each phase has its deadline, and there are at most n finalizers.
    for _ in range(2 * n + 12):
        decision = world.settle()
        if isinstance(decision, machine.Wait):
            world.now = decision.until_ms
    assert isinstance(decision, machine.Reopen | machine.EndJob)
    places = [ORDER.index(phase) for phase in world.trail if phase in ORDER]
    assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 16), steps())
def test_an_attempt_survives_the_store_unchanged(n: int, history: list[tuple[str, int, int]]) -> None:
    world = World(n)
    for kind, number, milliseconds in history:
        if kind in ("answer", "lie"):
            world.answer(world.attempt.cohort[number % n], lie=kind == "lie")
        elif kind == "everyone":
            for other in world.attempt.members:
                world.answer(other, lie=False)
        elif kind == "time":
            world.now += milliseconds
        world.settle()
        fields = {str(key).encode(): str(value).encode() for key, value in record_fields(world.attempt).items()}
        assert parse_attempt(fields[b"core"]) == world.attempt
    held = world.reports
    record = {f"r:upload:{name}".encode(): report_value(item).encode() for name, item in held.uploads.items()}
    record |= {f"r:digest:{name}".encode(): report_value(item).encode() for name, item in held.digests.items()}
    record |= {f"r:state:{name}".encode(): report_value(item).encode() for name, item in held.states.items()}
    record |= {f"r:verdict:{name}".encode(): report_value(item).encode() for name, item in held.verdicts.items()}
    for kind, names in (
        (Kind.READY, held.ready),
        (Kind.SHARES, held.shares),
        (Kind.CONFIRMATION, held.confirmations),
        (Kind.REVEAL, held.reveals),
    ):
        record |= {f"r:{kind}:{name}".encode(): b"0" for name in names}
    record |= {f"q:{kind}".encode(): str(ms).encode() for kind, ms in held.reached_ms.items()}
    assert parse_reports(record) == held
