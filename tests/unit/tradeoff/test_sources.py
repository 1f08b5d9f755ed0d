"""A curve is never drawn on records that are not known to be public."""

from pathlib import Path

import pytest
from rich.console import Console

from services.common.errors import Code, FedmeshError
from services.demo import datasets
from services.demo.synthetic import generate
from services.plans.library import shipped_plan
from services.plans.manifest import PlanManifest
from services.tradeoff import sources
from services.tradeoff.run import TradeoffOptions, run_tradeoff
from services.tradeoff.sources import public_folder, read_hospitals

PLAN = shipped_plan("readmission-logistic-private")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files in the form of diabetes-130 that say nothing about where they come from."""
    folder = tmp_path_factory.mktemp("records")
    generate(folder, (60, 50, 40, 30))
    return folder


def test_unknown_records_are_refused_and_the_way_out_is_named(folder: Path) -> None:
    with pytest.raises(FedmeshError, match="charged to their ledger") as caught:
        public_folder(folder, PLAN, declared_public=False)
    assert caught.value.code is Code.PRIVACY_REFUSED
    assert "--public" in caught.value.message
    assert len(public_folder(folder, PLAN, declared_public=True).hospitals) == 4


def test_records_that_are_known_to_be_public_are_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = public_folder(folder, PLAN, declared_public=True)
    digest = sources.encounters_sha256(found.encounters, PLAN)
    assert digest is not None
    monkeypatch.setattr(sources, "PUBLIC_ENCOUNTERS", frozenset({digest}))
    assert not public_folder(folder, PLAN, declared_public=False).synthetic


def test_a_synthetic_cohort_is_taken_for_what_it_is(tmp_path: Path) -> None:
    generate(tmp_path, (30, 20, 20, 20))
    # As a demonstration marks what it makes.
    (tmp_path / "source.txt").write_text("synthetic\n")
    assert public_folder(tmp_path, PLAN, declared_public=False).synthetic


def test_hospitals_are_read_and_fewer_than_four_are_refused(folder: Path) -> None:
    data = public_folder(folder, PLAN, declared_public=True)
    assert [len(each.y) > 0 for each in read_hospitals(data, PLAN)] == 4 * [True]
    three = datasets.DemoData(data.name, data.encounters, data.partition, data.hospitals[:3], False)
    with pytest.raises(FedmeshError) as caught:
        read_hospitals(three, PLAN)
    assert caught.value.code is Code.PRIVACY_REFUSED


@pytest.mark.parametrize(
    ("plan", "changes", "code"),
    [
        (shipped_plan("readmission-logistic"), {}, Code.PLAN_INVALID),
        (PLAN, {"out": Path("nowhere/curve.png")}, Code.INVALID_ARGUMENT),
        (PLAN, {"report": Path("nowhere/report.json")}, Code.INVALID_ARGUMENT),
        (PLAN, {"data": Path("nowhere")}, Code.DATA_INVALID),
        (PLAN, {"ledgers": (Path("nowhere"),)}, Code.NOT_FOUND),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_takes_time(
    tmp_path: Path, plan: PlanManifest, changes: dict[str, object], code: Code
) -> None:
    options = TradeoffOptions(plan, (0.5,), folder=tmp_path / "work", **changes)  # type: ignore[arg-type]
    with pytest.raises(FedmeshError) as caught:
        run_tradeoff(options, Console(quiet=True))
    assert caught.value.code is code
    assert not (tmp_path / "work").exists()
