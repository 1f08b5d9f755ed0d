"""What simulates or measures training, on the tiny plans that are compiled once for this folder's tests."""

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from services.bench import large_hospital, one_hospital
from services.bench.large_hospital import LargeReport, scan_seconds
from services.bench.schema_data import write_hospital
from services.bench.training import federated_seconds, pooled_dataset, pooled_seconds
from services.common.errors import FedmeshError
from services.hospital_node.domain.ports import NoiseRequest
from services.hospital_node.noise import ShareOfNoise, training_noise
from services.hospital_node.sources.dataset import SplitName
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.training.state import read_state
from services.hospital_node.training.trainer import Trainer
from services.secure_sum.wire import layout_of
from services.tradeoff.grid import plan_at
from services.tradeoff.simulation import Simulation
from tests.support.tiny_plan import FEDAVG, PRIVATE, dataset, manifest

PLAN = manifest(PRIVATE)
PLAIN = manifest(FEDAVG)
HOSPITALS = 4


def test_a_simulation_is_the_hospitals_training_under_the_promised_noise(cache: Path) -> None:
    sets = [dataset(PLAN, seed, patients=60) for seed in range(HOSPITALS)]
    trainers = [Trainer(PLAN, data, cache) for data in sets]
    state = trainers[0].initial_state()
    for number in range(1, PLAN.rounds.count + 1):
        total = np.sum([trainer.contribution(state, number) for trainer in trainers], axis=0)
        state = trainers[0].update(state, total, HOSPITALS)
    exact = read_state(state).average
    rounds: list[None] = []
    simulation = Simulation(PLAN, sets, cache)
    far = [
        float(
            np.abs(
                read_state(simulation.run(plan_at(PLAN, epsilon), lambda: rounds.append(None))).average - exact
            ).max()
        )
        for epsilon in (10.0, 0.01)
    ]
    assert len(rounds) == 2 * PLAN.rounds.count
    # Noise moves a weight by 0.009 or 4.8 a round (standard deviations), and the last rounds' mean by about 0.03 or 13:
    # both sides of 0.5 are wrong less often than once in 10^8 times.
    assert 0 < far[0] < 0.5 < far[1]
    sigma = [training_noise(plan_at(PLAN, epsilon), HOSPITALS).sum_sigma for epsilon in (10.0, 0.01)]
    assert sigma[1] > 100 * sigma[0]


def test_hospitals_alone_bear_all_of_the_noise(cache: Path) -> None:
    # Hospitals of the same data learn together what each of them learns alone, but for the noise.
    sets = [dataset(PLAN, 1, patients=60)] * HOSPITALS
    trainer = Trainer(PLAN, sets[0], cache)
    state = trainer.initial_state()
    for number in range(1, PLAN.rounds.count + 1):
        state = trainer.update(state, HOSPITALS * trainer.contribution(state, number), HOSPITALS)
    exact = read_state(state).average
    simulation = Simulation(PLAN, sets, cache)
    sigma = training_noise(plan_at(PLAN, 10.0), HOSPITALS).sigma
    for far, times in ((False, 1), (True, 1000)):
        alone = [read_state(each).average for each in simulation.alone(PLAN, times * sigma, lambda: None)]
        assert len({each.tobytes() for each in alone}) == HOSPITALS
        # As above: noise moves a weight by some 0.02 or 20 a round.
        assert all((np.abs(each - exact).max() > 0.5) == far for each in alone)


def test_without_privacy_a_simulation_is_exact(cache: Path) -> None:
    sets = [dataset(PLAIN, seed) for seed in range(HOSPITALS)]
    first, second = (Simulation(PLAIN, sets, cache).run(PLAIN, lambda: None) for _ in range(2))
    assert first == second


def test_a_hospital_goes_from_parquet_to_its_masked_upload(tmp_path: Path, cache: Path) -> None:
    data, kept = tmp_path / "hospital.parquet", tmp_path / "node"
    kept.mkdir()
    encounters = write_hospital(data, PLAN, 300)
    found = one_hospital.contribute(data, PLAN, cache, kept)
    assert found["encounters"] == encounters > 300
    phases = found["phase_s"]
    assert isinstance(phases, dict)
    assert set(phases) == set(large_hospital.PHASES)
    assert all(seconds > 0 for seconds in phases.values())
    layout = layout_of(PLAN.encoding.parameter_set, PLAN.vector_length, PLAN.encoding.lanes)
    assert found["upload_bytes"] == layout.upload_bytes
    # The masked ciphertext is on the disk, as before an upload.
    assert sum(path.stat().st_size for path in (kept / "ciphertexts").glob("*.masked")) == layout.upload_bytes
    assert scan_seconds(data, PLAN) > 0


def test_what_is_encrypted_carries_the_noise(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, kept = tmp_path / "hospital.parquet", tmp_path / "node"
    kept.mkdir()
    write_hospital(data, PLAN, 50)
    seen: list[NoiseRequest] = []

    class Watched(ShareOfNoise):
        def add(self, values, request):  # type: ignore[no-untyped-def]
            seen.append(request)
            return super().add(values, request)

    monkeypatch.setattr(one_hospital, "ShareOfNoise", Watched)
    one_hospital.contribute(data, PLAN, cache, kept)
    assert seen == [NoiseRequest(PLAN, 1, 15)]


def test_the_synthetic_hospital_is_in_the_schemas_vocabulary(tmp_path: Path) -> None:
    first, second = tmp_path / "first.parquet", tmp_path / "second.parquet"
    encounters = write_hospital(first, PLAN, 500)
    write_hospital(second, PLAN, 500)
    data = read_dataset(first, PLAN)
    assert len(data.y) == data.rows_read == encounters
    assert len(set(data.patient_ids)) == 500
    assert set(data.y) == {0.0, 1.0}
    # Some patients come again, and every column has all levels that the schema lists: the last ward is of others.
    assert 1.2 < encounters / 500 < 1.6
    assert (data.x.min(axis=0) < data.x.max(axis=0)).tolist() == [True, True, True, False, True]
    np.testing.assert_array_equal(read_dataset(second, PLAN).x, data.x)


def test_the_figures_of_a_large_hospital(tmp_path: Path) -> None:
    data = tmp_path / "hospital.parquet"
    data.write_bytes(bytes(2**20))
    found = {
        "features": 5, "encounters": 1400, "upload_bytes": 227, "start_s": 3.0,
        "phase_s": {"read": 1.0, "features": 2.0, "train_clip_sum": 0.5, "noise": 0.25, "encrypt": 0.25},
    }  # fmt: skip
    report = large_hospital._report(PLAN, 1000, data, 0.5, found, 3000.0)
    assert (report.patients_per_s, report.duckdb_scan_patients_per_s, report.ratio) == (250.0, 2000.0, 8.0)
    assert (report.parquet_mb, report.within_memory) == (1.0, False)
    assert shown(report).count("beyond") == 1
    assert "within" in shown(replace(report, within_memory=True))
    wanted = {
        "patients",
        "encounters",
        "parquet_mb",
        "phase_s",
        "patients_per_s",
        "duckdb_scan_patients_per_s",
        "ratio",
    }
    assert wanted | {"peak_rss_mb"} <= set(vars(report))


def shown(report: LargeReport) -> str:
    console = Console(file=io.StringIO(), width=100)
    large_hospital._show(console, report)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_the_hospitals_process_says_becomes_a_result_or_an_error() -> None:
    assert large_hospital._answer('{"encounters": 1}\n', "", 0) == {"encounters": 1}
    with pytest.raises(FedmeshError, match=r"no room .*data-invalid"):
        large_hospital._answer(json.dumps({"error": "no room", "code": "data-invalid"}), "", 1)
    with pytest.raises(FedmeshError, match=r"status -9: Killed"):
        large_hospital._answer("", "Traceback\nKilled", -9)


def test_the_critical_path_is_the_slowest_hospital_of_each_round(cache: Path) -> None:
    sets = [dataset(PLAN, seed, patients=40 * (seed + 1)) for seed in range(HOSPITALS)]
    seconds = federated_seconds(PLAN, [Trainer(PLAN, data, cache) for data in sets])
    assert seconds.shape == (PLAN.rounds.count, HOSPITALS)
    assert (seconds > 0).all()
    assert pooled_seconds(PLAN, Trainer(PLAN, pooled_dataset(sets), cache), HOSPITALS) > 0


def test_pooled_data_trains_as_the_hospitals_together(cache: Path) -> None:
    sets = [dataset(PLAN, seed, patients=30 + seed) for seed in range(HOSPITALS)]
    pooled = pooled_dataset(sets)
    for side in SplitName:
        assert pooled.rows(side).patients == sum(each.rows(side).patients for each in sets)
    trainers = [Trainer(PLAN, data, cache) for data in sets]
    state = trainers[0].initial_state()
    apart = np.sum([trainer.contribution(state, 4) for trainer in trainers], axis=0)
    np.testing.assert_array_equal(Trainer(PLAN, pooled, cache).contribution(state, 4), apart)
