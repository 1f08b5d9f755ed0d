"""The noise under attack: it must keep what is claimed, and half of it must be found out.

The probability that a test here fails although all is well is computed, exactly and by the code under
`services.privacy.empirical`, for the runs of the test, and asserted to be below 1e-6.
"""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from services.bench.privacy_audit import AuditOptions, AuditReport, Game, ScaledNoise, audit_plan, run_privacy_audit
from services.common.errors import Code, FedmeshError
from services.hospital_node.noise import ShareOfNoise, mechanisms
from services.plans.library import shipped_plan
from services.privacy.empirical import chances, claimed_mu

MOST_WRONG = 1e-6


def audit(**options: object) -> AuditReport:
    return run_privacy_audit(AuditOptions(**options), Console(file=io.StringIO()))  # type: ignore[arg-type]


def test_the_noise_keeps_the_claim(tmp_path: Path) -> None:
    found = audit(report=tmp_path / "report.json")
    assert (found.epsilon, found.delta, found.colluders) == (0.5, 1e-6, 4)
    assert (found.hospitals, found.survivors, found.runs) == (15, 11, 6000)
    assert found.false_alarm < MOST_WRONG
    assert found.holds
    assert found.epsilon_bound <= found.epsilon
    assert json.loads((tmp_path / "report.json").read_text())["epsilon_bound"] == found.epsilon_bound


def test_half_the_noise_is_found_out() -> None:
    found = audit(noise_factor=0.5)
    assert found.missed < MOST_WRONG
    assert not found.holds
    assert found.epsilon_bound > found.epsilon
    true_mu = 2 * claimed_mu(found.epsilon, found.delta)
    assert chances(found.runs, true_mu, 2 * true_mu, found.confidence, paired=True).false_alarm < MOST_WRONG
    assert found.epsilon_bound < found.half_noise_epsilon == pytest.approx(1.0525, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("noise_factor", "holds"), [(1.0, True), (0.5, False)])
def test_fresh_noise_in_each_world(noise_factor: float, holds: bool) -> None:
    found = audit(runs=25_000, paired=False, confidence=0.9999, noise_factor=noise_factor)
    assert max(found.false_alarm, found.missed) < MOST_WRONG
    assert found.holds == holds


def test_what_the_attacker_sees_is_the_honest_noise_and_the_canaries() -> None:
    class Silent(ShareOfNoise):
        """Hospitals that add nothing: what is left is what the attacker does not know of the contributions."""

        def add(self, values, request):  # type: ignore[no-untyped-def]
            return values

    plan = audit_plan()
    game = Game(plan, Silent())
    assert not game.seen(canaries=False).any()
    np.testing.assert_array_equal(game.seen(canaries=True), game.canaries)
    # As long as clipping and rounding allow, and no longer.
    assert (game.canaries <= plan.train_sensitivity).all()
    assert (game.canaries > 0.9999 * plan.train_sensitivity).all()


def test_the_audited_noise_is_that_of_the_shipped_claim() -> None:
    plan, shipped = audit_plan(), shipped_plan("readmission-logistic-private")
    assert plan.privacy is not None
    assert shipped.privacy is not None
    assert (plan.privacy.epsilon, plan.privacy.delta) == (shipped.privacy.epsilon, shipped.privacy.delta)
    assert plan.train_sensitivity == shipped.train_sensitivity
    game = Game(plan, ScaledNoise(1.0))
    [(part, mechanism)] = mechanisms(game._request)
    assert mechanism.compositions == 1
    assert ScaledNoise(1.0).plan(mechanism) == ShareOfNoise().plan(mechanism)
    assert (part.stop, mechanism.hospitals) == (plan.vector_length, 15)


@pytest.mark.parametrize("options", [{"runs": 10}, {"noise_factor": 0.0}, {"noise_factor": float("nan")},
                                     {"confidence": 1.0}])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(FedmeshError) as caught:
        audit(**options)
    assert caught.value.code is Code.INVALID_ARGUMENT
