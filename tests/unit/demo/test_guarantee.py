"""Fewer colluders than the hospitals tolerate: what a demonstration says, and what its hospitals are told to accept."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from services.common.errors import Code, FedmeshError
from services.demo.guarantee import hospital_privacy, lowered_guarantee
from services.demo.run import DemoOptions, choose_plan
from services.hospital_node.config import PrivacyConfig
from services.hospital_node.domain.policy import Policy, require_acceptable


def policy(settings: Mapping[str, object]) -> Policy:
    privacy = PrivacyConfig.model_validate(settings)
    limits = (privacy.max_plan_epsilon, privacy.max_plan_delta, privacy.allow_without_privacy)
    return Policy("h1", "clinic", *limits, 100, 1000, least_colluders=privacy.least_colluders)


@pytest.mark.parametrize("f", [None, 4, 2, 0])
def test_the_demonstrations_hospitals_take_its_plan_and_a_stricter_one_does_not(tmp_path: Path, f: int | None) -> None:
    plan = choose_plan(DemoOptions(tmp_path, colluders=f))
    settings = hospital_privacy(tmp_path, plan, "h1", "clinic")
    require_acceptable(policy(settings), plan, 15)
    said = lowered_guarantee(plan, 15)
    if f in (None, 4):
        assert said == ""
        require_acceptable(policy({}), plan, 15)
        return
    assert f"(epsilon 0.5, delta 1e-06, f {f})" in said
    assert f"privacy.least_colluders: {f}" in said
    for demand in ({}, {"least_colluders": 4}):
        with pytest.raises(FedmeshError, match=f"against f = {f} colluding") as caught:
            require_acceptable(policy(demand), plan, 15)
        assert caught.value.code is Code.PRIVACY_REFUSED


def test_an_f_that_the_roster_cannot_give_is_refused(tmp_path: Path) -> None:
    plan = choose_plan(DemoOptions(tmp_path, colluders=4))
    for check in (lowered_guarantee, lambda plan, n: require_acceptable(policy({}), plan, n)):
        with pytest.raises(FedmeshError, match="needs a larger roster") as caught:
            check(plan, 4)
        assert caught.value.code is Code.PRIVACY_REFUSED
