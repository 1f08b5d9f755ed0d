"""Asynchronous training in one process: which hospital contributes to which version, by the node's own rules.

Time is counted in units in which a hospital of pace 1 trains once; crypto takes none. What is summed is what nodes sum:
`domain.staleness.contribution`, in integers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from services.hospital_node.domain.ports import Int64Vector
from services.hospital_node.domain.staleness import Trained, contribution
from services.plans.manifest import PlanManifest

Train = Callable[[int, bytes], Int64Vector]
"""A hospital's clipped contribution for a state."""
Update = Callable[[bytes, Int64Vector, int], bytes]


@dataclass
class Course:
    """How a job went. ages: of every round's contributions, by hospital; ended: when the last round did."""

    state: bytes
    ended: float = 0.0
    ages: list[dict[int, int]] = field(default_factory=list)


def run(plan: PlanManifest, paces: Sequence[float], state: bytes, train: Train, update: Update) -> Course:
    """All rounds of a plan. paces: how long each hospital trains.

    In synchronous plans everybody is in every group; in asynchronous ones the first K that are ready, and a hospital
    whose result is older than the bound when it is ready throws it away and trains on the newest version.
    """
    course = Course(state)
    now = 0.0
    held = {number: Trained(0, train(number, state)) for number in range(len(paces))}
    ready_at = {number: now + pace for number, pace in enumerate(paces)}
    enough = plan.rounds.k if plan.rounds.asynchronous and plan.rounds.k is not None else len(paces)
    for round_number in range(1, plan.rounds.count + 1):
        version = round_number - 1
        for number, trained in held.items():
            if version - trained.version > plan.rounds.oldest:
                # It is busy until the old one is done.
                ready_at[number] = max(ready_at[number], now) + paces[number]
                held[number] = Trained(version, train(number, course.state))
        group = sorted(sorted(held, key=lambda number: ready_at[number])[:enough])
        now = max(now, *(ready_at[number] for number in group))
        ages = {number: version - held[number].version for number in group}
        total = np.zeros(plan.vector_length, dtype=np.int64)
        for number in group:
            total += contribution(plan, held[number], ages[number], round_number)
        course.state = update(course.state, total, len(group))
        course.ages.append(ages)
        for number in group:
            held[number] = Trained(round_number, train(number, course.state))
            ready_at[number] = now + paces[number]
    course.ended = now
    return course
