"""The game: the centre and f hospitals against the honest ones, with a secret bit, a victim and a sum to spoil.

In world 0 the honest hospitals `a` and `b` hold the data A and B, in world 1 they hold B and A: every sum over both is
the same. The coalition knows A, B and everybody's noise, and has to tell which world it is in. (A *lone* game has only
one hospital's vector differ, one that no sum may include.) It wins also by naming one honest vector, which it does not
know then, or by making an honest hospital accept a sum that is not the sum of what the listed hospitals put in.
"""

import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from services.common.errors import FedmeshError
from services.secure_sum import statements
from services.secure_sum.statements import AttemptRef, Survivors
from tests.simulation.arithmetic import Integers, Plain, add, centred
from tests.simulation.collusion.knowledge import Knowledge
from tests.simulation.consortium import Consortium, consortium
from tests.simulation.hospital import Hospital
from tests.simulation.messages import Answer, Step, Task

JOB = "99999999-2222-4333-8444-555555555555"
DATA = 1 << 20
NOISE = 1 << 12


@dataclass(frozen=True)
class Build:
    """The protocol that is attacked: the real one, or a mutant that lacks one thing."""

    name: str
    hospital: type[Hospital] = Hospital
    patches: tuple[tuple[Any, str, Any], ...] = ()
    self_masks: bool = True
    pair_masks: bool = True
    fresh_noise: bool = True

    def applied(self) -> AbstractContextManager[object]:
        """The patches, for as long as the game lasts."""
        stack = ExitStack()
        for owner, name, substitute in self.patches:
            stack.enter_context(patch.object(owner, name, substitute))
        return stack


REAL = Build("the protocol")


@dataclass(frozen=True)
class Opened:
    """A sum that the coalition unmasked."""

    attempt: AttemptRef
    survivors: tuple[str, ...]
    total: Integers


@dataclass
class Game:
    """One game; the coalition plays through `ask` and through what `Knowledge` collects."""

    seed: int
    size: int
    build: Build = REAL
    lone: bool = False
    label: str = ""
    """Names the strategy, so that every one has secrets of its own."""
    refusals: list[tuple[str, Step, FedmeshError]] = field(default_factory=list)
    opened: list[Opened] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.random = random.Random(f"collusion {self.label} {self.seed} {self.size}")
        self._secret = random.Random(f"secret {self.label} {self.seed} {self.size}")
        self.plain = Plain()
        self.members: Consortium = consortium(self.size)
        self.roster = self.members.roster
        ids = list(self.members.ids)
        self.random.shuffle(ids)
        self.corrupt = tuple(sorted(ids[: self.roster.colluders]))
        self.honest = tuple(sorted(ids[self.roster.colluders :]))
        self.a, self.b, self.c = self.random.sample(self.honest, 3)
        self.bit = self._secret.randrange(2)
        self._data = {name: self._vector(DATA) for name in self.members.ids}
        self._other = self._vector(DATA)
        self._noise: dict[tuple[AttemptRef, str], Integers] = {}
        self.hospitals = {name: self._hospital(name, keys) for name, keys in self.members.keys.items()}
        self.knowledge = Knowledge(self.roster, self.plain, self.build.self_masks, self.build.pair_masks)

    def _vector(self, bound: int) -> Integers:
        return tuple(self._secret.randint(-bound, bound) for _ in range(self.plain.length))

    def _hospital(self, name: str, keys: Any) -> Hospital:
        kind = self.build.hospital if name in self.honest else Hospital
        return kind(keys, self.roster, self.plain, lambda attempt: self.world(self.bit, attempt, name))

    def add_sybil(self, keys: Any) -> None:
        """A hospital of the coalition's making."""
        name = keys.hospital_id
        self._data[name] = self._vector(DATA)
        self.corrupt = (*self.corrupt, name)
        self.hospitals[name] = self._hospital(name, keys)

    # --- what the coalition may use

    def attempt(self, round_number: int, number: int) -> AttemptRef:
        return AttemptRef(job_id=JOB, round=round_number, attempt=number)

    def world(self, bit: int, attempt: AttemptRef, hospital: str) -> Integers:
        """What a hospital holds in an attempt in one of the worlds."""
        return add([self._data_in(bit, hospital), self.noise(attempt, hospital)])

    def _data_in(self, bit: int, hospital: str) -> Integers:
        if self.lone:
            return self._other if bit and hospital == self.c else self._data[hospital]
        swapped = {self.a: self.b, self.b: self.a} if bit else {}
        return self._data[swapped.get(hospital, hospital)]

    def noise(self, attempt: AttemptRef, hospital: str) -> Integers:
        key = (attempt if self.build.fresh_noise else self.attempt(1, 1), hospital)
        return self._noise.setdefault(key, self._vector(NOISE))

    def ask(self, hospital: str, task: Task) -> Answer | None:
        """Give a task to a hospital; None when it refuses."""
        try:
            return self.hospitals[hospital].perform(task)
        except FedmeshError as error:
            if hospital in self.honest:
                self.refusals.append((hospital, task.step, error))
            return None

    # --- the verdict

    def unmasked_twice(self) -> bool:
        sums = {(o.attempt.round, o.attempt.attempt, o.survivors) for o in self.opened}
        return len(sums) > len({found[0] for found in sums})

    def is_vector_of(self, attempt: AttemptRef, hospital: str, claim: Integers) -> bool:
        return hospital in self.honest and self.world(self.bit, attempt, hospital) == tuple(map(centred, claim))

    def wrong_acceptances(self) -> list[str]:
        """Honest hospitals that signed for a sum which is not that of the hospitals in their list."""
        found = []
        for name in self.honest:
            for attempt, record in self.hospitals[name].disk.items():
                state = self.hospitals[name].state(attempt)
                if state.digest is not None:
                    listed = statements.parse(Survivors, state.survivors).ids
                    expected = add([self.world(self.bit, attempt, h) for h in listed])
                    uploaded = all(self.has_uploaded(attempt, h) for h in listed)
                    if record.result != expected or len(listed) < self.roster.threshold or not uploaded:
                        found.append(name)
        return found

    def has_uploaded(self, attempt: AttemptRef, hospital: str) -> bool:
        hospital_ = self.hospitals[hospital]
        return attempt in hospital_.disk and hospital_.state(attempt).upload is not None


@dataclass(frozen=True)
class Verdict:
    """What the coalition achieved in one game."""

    guesses: Mapping[str, bool]
    """By way of guessing: was the guess of the world right?"""
    recovered: bool
    spoiled: bool
    """An honest hospital signed for a wrong sum."""
    twice: bool
    """Two sums of one round were unmasked."""
    refused: Sequence[tuple[str, Step, FedmeshError]]

    @property
    def won(self) -> bool:
        """Won outright; guesses count only over many games."""
        return self.recovered or self.spoiled or self.twice
