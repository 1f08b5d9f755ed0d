"""Local steps by measured speed, and the scale that keeps the sum unbiased."""

import numpy as np
import pytest

from services.hospital_node.training.speed import StepCount, accumulated
from services.plans.algorithms import FedAvg


def algorithm(momentum: float = 0.0, most: int = 10) -> FedAvg:
    return FedAvg(kind="fedavg", local_steps=most, learning_rate=0.1, momentum=momentum, target_s=1.0)


class Machine:
    """Takes `step_s` for a step."""

    def __init__(self, step_s: float) -> None:
        self.step_s = step_s
        self.now = 0.0

    def run(self, count: StepCount) -> int:
        steps = count.begin()
        self.now += steps * self.step_s
        count.end()
        return steps


@pytest.mark.parametrize(("step_s", "expected"), [(0.01, 10), (0.25, 4), (0.6, 1), (5.0, 1)])
def test_as_many_steps_as_fit(step_s: float, expected: int) -> None:
    machine = Machine(step_s)
    count = StepCount(algorithm(), 1.0, lambda: machine.now)
    assert [machine.run(count) for _ in range(3)] == [1, expected, expected]


def test_a_machine_that_becomes_slower_makes_fewer() -> None:
    machine = Machine(0.1)
    count = StepCount(algorithm(), 1.0, lambda: machine.now)
    machine.run(count)
    assert machine.run(count) == 10
    machine.step_s = 0.5
    for _ in range(20):
        last = machine.run(count)
    assert last == 2


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_the_accumulated_gradients_are_those_of_the_recurrence(momentum: float) -> None:
    for steps in range(1, 12):
        velocity, moved = 0.0, 0.0
        for _ in range(steps):
            velocity = momentum * velocity + 1.0
            moved += velocity
        assert accumulated(steps, momentum) == pytest.approx(moved)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_with_a_constant_gradient_every_number_of_steps_gives_the_same_contribution(momentum: float) -> None:
    """What FedNova corrects: hospitals that make more steps must not pull the sum towards themselves."""
    gradient, rate = np.array([0.3, -1.2]), 0.1
    count = StepCount(algorithm(momentum), 1.0)
    contributions = []
    for steps in range(1, 11):
        weights, velocity = np.zeros(2), np.zeros(2)
        for _ in range(steps):
            velocity = momentum * velocity + gradient
            weights = weights - rate * velocity
        contributions.append(weights * count.scale(steps))
    assert np.allclose(contributions, contributions[-1])
    assert count.scale(10) == 1.0
