import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.policy import plan_loss
from services.plans.library import shipped_plan
from services.tradeoff.grid import DEFAULT_GRID, parse_grid, plan_at, require_private, without_privacy

PLAN = shipped_plan("readmission-logistic-private")


def test_a_grid_is_sorted() -> None:
    assert parse_grid(" 1, .1,0.5") == (0.1, 0.5, 1.0)
    assert 0.5 in parse_grid(DEFAULT_GRID)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0.5,0", "'0'"),
        ("-1", "'-1'"),
        ("0.5,,1", "''"),
        ("", "''"),
        ("half", "'half'"),
        ("nan", "'nan'"),
        ("inf", "'inf'"),
        ("0.5,11", "'11'"),
        ("0.5,.50", "0.5 twice"),
        (",".join(str(value / 100) for value in range(1, 42)), "41 values"),
    ],
)
def test_a_bad_grid_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(FedmeshError, match=named) as caught:
        parse_grid(text)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_only_epsilon_differs_along_the_grid() -> None:
    changed = plan_at(PLAN, 2.0)
    assert plan_loss(changed) == (2.0, 1e-6)
    assert plan_at(changed, 0.5) == PLAN


def test_the_reference_has_no_privacy_and_the_same_model() -> None:
    plain = without_privacy(PLAN)
    assert plain.privacy is None
    assert plan_loss(plain) == (0.0, 0.0)
    assert (plain.model, plain.algorithm, plain.features, plain.rounds) == (
        *(PLAN.model, PLAN.algorithm, PLAN.features, PLAN.rounds),
    )


def test_a_plan_without_privacy_has_nothing_to_trade() -> None:
    require_private(PLAN)
    with pytest.raises(FedmeshError, match="nothing to trade") as caught:
        require_private(shipped_plan("readmission-logistic"))
    assert caught.value.code is Code.PLAN_INVALID
