"""Asynchronous rounds in the simulation: slow hospitals whose results go into later rounds, and what must hold then.

The promises: a sum is exact over the weighted results of its survivors; a result is never sent for two versions, and no
hospital is twice in one; no result is older than the plan allows.
"""

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import count

from services.plans.staleness import weight_units
from services.secure_sum.cohort import threshold
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import Advert, AttemptRef, Survivors, parse
from tests.simulation.arithmetic import Arithmetic, Integers, add
from tests.simulation.centre import Coordinator
from tests.simulation.hospital import Busy, Hospital, Outcome, Record
from tests.simulation.messages import Step, Task
from tests.simulation.oracle import Violation, require
from tests.simulation.schedules import SIZES, stormy
from tests.simulation.world import Summary, Weather, World


@dataclass
class Result:
    """What training came to, in a hospital's memory only. left: how often it is asked before training is done."""

    number: int
    version: int
    values: Integers
    left: int
    attempts: list[AttemptRef] = field(default_factory=list)


class SlowHospital(Hospital):
    """Trains over several rounds, as the node does: see `usecases.trainings` and `RoundSteps._used` there.

    On its disk beside the base's: which attempts it will never answer again (`retired`).
    """

    def __init__(
        self,
        keys: MemberKeys,
        roster: Roster,
        arithmetic: Arithmetic,
        draw: Callable[[AttemptRef], Integers],
        train: Callable[[int, Integers], Result],
        note: Callable[[str], None],
    ) -> None:
        super().__init__(keys, roster, arithmetic, draw)
        self.retired: set[AttemptRef] = set()
        self.held: Result | None = None
        self.made: dict[tuple[AttemptRef, str], Result] = {}
        self._train_anew = train
        self._note = note

    def crash(self) -> None:
        super().crash()
        self.held = None

    def work(self, task: Task) -> Outcome:
        if task.attempt in self.retired:
            raise Busy
        return super().work(task)

    def _train(self, task: Task) -> Outcome:
        if task.attempt in self.disk:
            return super()._train(task)
        result = self._result(task)
        age = task.attempt.round - 1 - result.version
        self.retire(attempt for attempt in result.attempts if attempt.round != task.attempt.round)
        result.attempts.append(task.attempt)
        self.made[task.attempt, self.id] = result
        state = self.member().begin(task.attempt, task.epoch, task.cohort, age)
        values = tuple(weight_units(age) * value for value in result.values)
        return self._outcome(task, Record(b"", values, self._arithmetic.prepare()), state, signed=(state.advert,))

    def retire(self, attempts: Iterable[AttemptRef]) -> None:
        """Delete what was made for attempts at other rounds, so that it can never be sent."""
        for attempt in attempts:
            self.retired.add(attempt)
            self.disk.pop(attempt, None)
            self._memory.pop(attempt, None)

    def _result(self, task: Task) -> Result:
        newest = task.attempt.round - 1
        held = self.held
        if held is not None and held.version > newest:
            # A task of a round that is over.
            raise Busy
        if held is not None and (newest - held.version > task.oldest or self.sent_elsewhere(held, task.attempt)):
            self._note("discarded")
            held = None
        if held is None:
            held = self.held = self._train_anew(newest, self._draw(task.attempt))
        if held.left > 0:
            held.left -= 1
            raise Busy
        return held

    def sent_elsewhere(self, result: Result, attempt: AttemptRef) -> bool:
        """Whether an upload was made durable, and perhaps sent, for another version."""
        return any(
            other.round != attempt.round and other in self.disk and self.disk[other].ciphertext
            for other in result.attempts
        )


class SlowWorld(World):
    """`enough`: K of the plan; `oldest`: its bound on the age; `patience`: how long the slowest training takes."""

    def __init__(self, seed: int, size: int, weather: Weather, enough: int, oldest: int, patience: int) -> None:
        self.enough = enough
        self.oldest = oldest
        self.numbers = count(1)
        pace = random.Random(f"pace {seed}")
        self.pace = {f"h{number:02}": pace.randint(0, patience) for number in range(1, size + 2)}
        self.truth: dict[int, tuple[int, Integers]] = {}
        """Version and values of every result, by its number."""
        self.sent_for: dict[tuple[str, int], int] = {}
        super().__init__(seed, size, weather)

    def _coordinator(self) -> Coordinator:
        self.summary.attempts += 1
        place = (self.registry, self.ciphertexts, self.roster, self.arithmetic, self.patient)
        return Coordinator(*place, enough=self.enough, oldest=self.oldest)

    def _hospital(self, keys: MemberKeys) -> Hospital:
        name = keys.hospital_id

        def train(version: int, values: Integers) -> Result:
            number = next(self.numbers)
            self.truth[number] = version, values
            return Result(number, version, values, self.pace[name])

        return SlowHospital(keys, self.roster, self.arithmetic, self._draw, train, lambda what: self._note(what, name))

    def _ask(self, hospital: Hospital, task: Task) -> None:
        before = len(self.flying)
        super()._ask(hospital, task)
        if task.step is Step.UPLOAD and len(self.flying) > before:
            assert isinstance(hospital, SlowHospital)
            result = hospital.made[task.attempt, hospital.id]
            version = self.sent_for.setdefault((hospital.id, result.number), task.attempt.round)
            require(version == task.attempt.round, f"{hospital.id} sends one result for one version")

    def _close(self, number: int) -> None:
        super()._close(number)
        closed = self.registry.closed[number]
        if closed.total is None:
            return
        attempt = closed.stored.attempt
        ages = {item.hospital_id: parse(Advert, item.statement).age for item in closed.stored.adverts}
        weighted = []
        for item in parse(Survivors, closed.stored.survivors).survivors:
            hospital = self.hospitals[item.hospital_id]
            assert isinstance(hospital, SlowHospital)
            age = ages[item.hospital_id]
            version, values = self.truth[hospital.made[attempt, hospital.id].number]
            require(age == number - 1 - version, f"{hospital.id} says the age of what it contributes")
            require(age <= self.oldest, "no contribution is older than the plan allows")
            if age:
                self._note("stale", f"{hospital.id} {age}")
            weighted.append(tuple(weight_units(age) * value for value in values))
        require(self.arithmetic.open(closed.total) == add(weighted), "the sum is that of the weighted results")


def build_slow(seed: int) -> SlowWorld:
    """The world of a seed: stormy, several rounds, groups of K, training of different length."""
    rng = random.Random(f"fedmesh asynchronous {seed}")
    size = rng.choice(SIZES)
    weather = replace(stormy(rng, size), rounds=rng.choice((3, 4, 5)), events=rng.randint(60, 120 * size))
    enough = rng.choice((threshold(size), threshold(size), size))
    return SlowWorld(seed, size, weather, enough, oldest=rng.choice((1, 2, 4)), patience=rng.choice((3, 10)))


def play_slow(seed: int) -> Summary:
    """Run one schedule. Raises: Violation with the seed."""
    try:
        return build_slow(seed).run()
    except Exception as error:
        how = f"python -m tests.simulation --asynchronous --seed {seed}"
        raise Violation(f"seed {seed}: {error}\nreplay: {how}") from error
