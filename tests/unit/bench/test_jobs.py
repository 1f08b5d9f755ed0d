"""The benchmark of many small jobs: plans with populations of their own, and hospitals that keep the plan's bound."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from services.bench.cohort import PATIENTS, CohortTrainer
from services.bench.jobs import JobsOptions, job_plan, run_jobs
from services.common.errors import Code, FedmeshError
from services.plans.library import shipped_plan
from services.plans.manifest import plan_id


def test_every_job_has_a_plan_of_its_own() -> None:
    plans = [job_plan(number, 10) for number in range(3)]
    assert len({plan_id(plan) for plan in plans}) == len({plan.name for plan in plans}) == 3
    assert {plan.rounds.count for plan in plans} == {10}
    assert {plan.privacy.epsilon for plan in plans if plan.privacy} == {0.5}


def test_a_light_hospital_learns_within_the_plans_bound() -> None:
    plan = job_plan(1, 10)
    trainer = CohortTrainer(plan, seed=1, hospital=2)
    state = trainer.initial_state()
    first = trainer.contribution(state, 1)
    assert first.dtype == np.int64
    assert first.shape == (plan.vector_length,)
    assert 0 < np.linalg.norm(first) <= PATIENTS * plan.train_sensitivity
    last = first
    # The plan divides by some fifteen hospitals' patients: as many hospitals as that make a step of useful size.
    for number in range(1, 60):
        last = trainer.contribution(state, number)
        state = trainer.update(state, last * (49_000 // PATIENTS), 15)
    assert np.linalg.norm(last) < np.linalg.norm(first) / 4


def test_populations_differ_from_hospital_to_hospital_and_from_plan_to_plan() -> None:
    state = bytes(8 * job_plan(1, 1).vector_length)
    sums = {
        CohortTrainer(job_plan(number, 1), 1, hospital).contribution(state, 1).tobytes()
        for number in (1, 2)
        for hospital in (1, 2)
    }
    assert len(sums) == 4


def test_a_plan_that_a_light_hospital_cannot_train_is_refused() -> None:
    with pytest.raises(FedmeshError) as refused:
        CohortTrainer(shipped_plan("readmission-logistic"), 1, 1)
    assert refused.value.code is Code.PLAN_INVALID


@pytest.mark.slow
def test_jobs_run_side_by_side(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = JobsOptions(tmp_path / "bench", jobs=2, concurrent=2, rounds=2, hospitals=4, report=report)
    found = run_jobs(options, Console(file=io.StringIO()))
    assert (found.jobs, found.rounds, found.burnt_rounds) == (2, 2, 0)
    assert json.loads(report.read_text())["models_per_hour"] == found.models_per_hour > 0
    assert min(found.centre_cpu_s, found.hospital_cpu_s, found.job_s["p50"]) > 0
