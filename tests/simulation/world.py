"""One seeded schedule: hospitals, a centre, a network and a clock, and everything that can go wrong between them."""

import random
from collections import Counter
from dataclasses import dataclass, field

from services.common.errors import FedmeshError
from services.secure_sum.roster import MemberKeys
from services.secure_sum.statements import AttemptRef
from tests.simulation.arithmetic import Arithmetic, Integers, Plain
from tests.simulation.centre import Ciphertexts, Coordinator, Registry
from tests.simulation.consortium import consortium, successor
from tests.simulation.hospital import Busy, Hospital
from tests.simulation.messages import Answer, Task
from tests.simulation.oracle import Oracle, Violation, require

FAIR_PASSES = 60


@dataclass(frozen=True)
class Weather:
    """How bad a schedule is; probabilities are per event."""

    events: int
    """Events before the network and the clock turn fair."""
    lose: float = 0.0
    duplicate: float = 0.0
    replay: float = 0.0
    crash: float = 0.0
    """A hospital crashes at a message: before it worked, before or after it saved."""
    deadline: float = 0.0
    coordinator: float = 0.0
    """The coordinator is replaced by one without memory."""
    zombie: float = 0.0
    """... and the old one goes on for a while."""
    aggregator: float = 0.0
    """... and the aggregator's ciphertexts are gone too."""
    dropped: int = 0
    """Hospitals that leave for ever, at some time."""
    rounds: int = 1
    change: str | None = None
    """What happens to the roster after the first round: a hospital may "join" or "leave"."""


@dataclass
class Summary:
    """What a schedule came to."""

    seed: int
    hospitals: int = 0
    happened: Counter[str] = field(default_factory=Counter)
    committed: int = 0
    burnt: int = 0
    attempts: int = 0


@dataclass(frozen=True)
class Envelope:
    """A task on its way to a hospital, or an answer on its way to the centre."""

    to: str
    body: Task | Answer


class World:
    """Runs one schedule. Everything but the keys follows from the seed."""

    def __init__(self, seed: int, size: int, weather: Weather, arithmetic: Arithmetic | None = None) -> None:
        self.random = random.Random(seed)
        self.weather = weather
        self.arithmetic = arithmetic or Plain()
        founders = consortium(size)
        self.roster = founders.roster
        self.oracle = Oracle(self.arithmetic)
        self.oracle.rosters[1] = self.roster
        self.summary = Summary(seed, size)
        self.log: list[str] = []
        self.hospitals = {name: self._hospital(keys) for name, keys in founders.keys.items()}
        self.registry = Registry("11111111-2222-4333-8444-555555555555")
        self.ciphertexts: Ciphertexts = {}
        self.patient = self.random.random() < 0.5
        self.coordinators = [self._coordinator()]
        self.flying: list[Envelope] = []
        self.history: list[Envelope] = []
        self.gone: set[str] = set()
        self.leaving = self.random.sample(sorted(self.hospitals), min(weather.dropped, size))
        self._results: dict[int, Integers | None] = {}

    def _coordinator(self) -> Coordinator:
        self.summary.attempts += 1
        return Coordinator(self.registry, self.ciphertexts, self.roster, self.arithmetic, self.patient)

    def _draw(self, attempt: AttemptRef) -> Integers:
        largest = self.arithmetic.largest
        return tuple(self.random.randint(-largest, largest) for _ in range(self.arithmetic.length))

    # --- the run

    def run(self) -> Summary:
        """Chaos, then fairness, then the books.

        Raises:
            Violation: a promise was broken.
        """
        self.tick()
        for _ in range(self.weather.events):
            if self.finished:
                break
            self.chaos()
            self.after_event()
        self.turn_fair()
        return self.summary

    @property
    def finished(self) -> bool:
        return self.registry.round > self.weather.rounds

    def chaos(self) -> None:
        """One event."""
        weather, roll = self.weather, self.random.random
        if self.leaving and roll() < 1.5 / max(1, weather.events) * len(self.leaving):
            self._leave(self.leaving.pop())
        if roll() < weather.deadline:
            self._note("deadline")
            self.random.choice(self.coordinators).deadline()
        elif roll() < weather.coordinator:
            self._replace_coordinator()
        elif roll() < weather.replay and self.history:
            self._note("replay")
            self._deliver(self.random.choice(self.history))
        elif roll() < weather.crash and (down := self._down()):
            self._restart(self.random.choice(down))
        elif not self.flying or roll() < 0.04:
            self.tick()
        else:
            self._fly(self.flying.pop(self.random.randrange(len(self.flying))))

    def _fly(self, envelope: Envelope) -> None:
        if self.random.random() < self.weather.lose:
            self._note("lost")
            return
        if self.random.random() < self.weather.duplicate:
            self._note("duplicated")
            self.flying.append(envelope)
        self._deliver(envelope)

    def tick(self) -> None:
        """The coordinators ask again for whatever is outstanding."""
        for coordinator in self.coordinators:
            for hospital, task in coordinator.tasks().items():
                self._post(Envelope(hospital, task))
        if not self.flying:
            for name in self._down():
                self._restart(name)

    def turn_fair(self) -> None:
        """No more faults: everything sent arrives, deadlines pass only when nothing else can happen."""
        for name in self.leaving:
            self._leave(name)
        del self.coordinators[:-1]
        for name in self._down():
            self._restart(name)
        self.weather = Weather(0, rounds=self.weather.rounds, change=self.weather.change)
        for _ in range(FAIR_PASSES):
            if self.finished:
                return
            before = len(self.log)
            self.tick()
            while self.flying:
                self._deliver(self.flying.pop(0))
                self.after_event()
            if self._quiet_since(before):
                self._note("quiet deadline")
                self.coordinators[0].deadline()
                self.after_event()
            if not self._can_finish():
                return
        require(False, "with at most n - t drops and fair delivery every round ends")

    def _can_finish(self) -> bool:
        """Whether at least t members are still there."""
        return len(set(self.roster.ids) - self.gone) >= self.roster.threshold

    def _quiet_since(self, before: int) -> bool:
        return not any(line.startswith("answer") for line in self.log[before:])

    # --- events

    def _post(self, envelope: Envelope) -> None:
        self.flying.append(envelope)
        self.history.append(envelope)

    def _deliver(self, envelope: Envelope) -> None:
        if isinstance(envelope.body, Answer):
            self._answer(envelope.body)
        elif self.hospitals[envelope.to].alive:
            self._ask(self.hospitals[envelope.to], envelope.body)

    def _answer(self, answer: Answer) -> None:
        before = [(c.run.attempt, c.run.step) for c in self.coordinators]
        for coordinator in self.coordinators:
            coordinator.receive(answer)
            require(not coordinator.blamed, f"nobody is blamed: {coordinator.blamed}")
        moved = [(c.run.attempt, c.run.step) for c in self.coordinators] != before
        self._note("answer", f"{answer.step.name} {answer.hospital_id} {answer.attempt.attempt}")
        if moved:
            self.tick()

    def _ask(self, hospital: Hospital, task: Task) -> None:
        crash = self.random.choice(("early", "unsaved", "unsent")) if self._crashes() else None
        if crash == "early":
            self._crash(hospital, crash)
            return
        try:
            outcome = hospital.work(task)
        except Busy:
            self._note("busy", hospital.id)
            return
        except FedmeshError as error:
            if self._is_over(task) and not set(task.cohort) <= set(self.roster.ids):
                # Never begun here, and replayed after the roster changed: a member is right to refuse it.
                self._note("of an earlier roster", hospital.id)
                return
            raise Violation(f"{hospital.id} refuses {task.step.name} from an honest centre: {error}") from error
        if crash == "unsaved":
            self._crash(hospital, crash)
            return
        hospital.save(outcome)
        self.oracle.took_part(task.attempt, hospital.id, outcome.record.values)
        if crash == "unsent":
            self._crash(hospital, crash)
            return
        self.oracle.sent(outcome.answer)
        self._post(Envelope("centre", outcome.answer))

    def _is_over(self, task: Task) -> bool:
        return all(coordinator.run.attempt.round > task.attempt.round for coordinator in self.coordinators)

    def _crashes(self) -> bool:
        return self.random.random() < self.weather.crash

    def _crash(self, hospital: Hospital, when: str) -> None:
        self._note("crash " + when, hospital.id)
        hospital.crash()

    def _down(self) -> list[str]:
        return [name for name, h in sorted(self.hospitals.items()) if not h.alive and name not in self.gone]

    def _restart(self, name: str) -> None:
        self._note("restart", name)
        self.hospitals[name].restart()

    def _leave(self, name: str) -> None:
        self._note("left", name)
        self.gone.add(name)
        self.hospitals[name].crash()

    def _replace_coordinator(self) -> None:
        self._note("coordinator lost", "survivors stored" if self.registry.stored else "before the list")
        if self.random.random() < self.weather.aggregator:
            self._note("ciphertexts lost")
            self.ciphertexts.clear()
        old = self.coordinators if self.random.random() < self.weather.zombie else []
        self.coordinators = [*old[-1:], self._coordinator()]
        self.tick()

    # --- the books

    def after_event(self) -> None:
        """Follow what the centre decided and check it."""
        for coordinator in self.coordinators:
            for attempt in coordinator.aborted:
                self._note("aborted", str(attempt.attempt))
                self.summary.attempts += 1
                self._check_abort(attempt)
            coordinator.aborted.clear()
        while len(self._results) < len(self.registry.closed):
            self._close(len(self._results) + 1)

    def _check_abort(self, attempt: AttemptRef) -> None:
        stored = self.registry.stored
        done = self.registry.closed.get(attempt.round)
        if attempt not in {stored.attempt if stored else None, done.stored.attempt if done else None}:
            self.oracle.aborted(attempt)

    def _close(self, number: int) -> None:
        closed = self.registry.closed[number]
        attempt = closed.stored.attempt
        results = {
            name: h.disk[attempt].result
            for name, h in self.hospitals.items()
            if attempt in h.disk and h.disk[attempt].result
        }
        self._results[number] = self.oracle.closed(closed, results)
        if closed.total is None:
            self.summary.burnt += 1
        else:
            self.summary.committed += 1
        self._note("burnt" if closed.total is None else "committed", f"round {number}")
        del self.coordinators[:-1]
        if not self.finished:
            self.summary.attempts += 1
            self._follow_roster(number)
            self.coordinators[0].next_round(self.roster)
            self.tick()

    def _follow_roster(self, closed_round: int) -> None:
        if closed_round == 1 and self.weather.change:
            self._note(self.weather.change)
            after = successor(self.roster.size, self.weather.change)
            self.roster = after.roster
            for name in after.ids:
                if name in self.hospitals:
                    self.hospitals[name].adopt(after.roster)
                else:
                    self.hospitals[name] = self._hospital(after.keys[name])
        self.oracle.rosters[closed_round + 1] = self.roster

    def _hospital(self, keys: MemberKeys) -> Hospital:
        return Hospital(keys, self.roster, self.arithmetic, self._draw)

    def _note(self, what: str, detail: str = "") -> None:
        self.summary.happened[what] += 1
        self.log.append(f"{what} {detail}".rstrip())
