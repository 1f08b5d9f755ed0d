"""The synthetic cohort: deterministic, in the public data's form, with skew, shift and a learnable signal."""

import hashlib
from pathlib import Path

import duckdb
import pytest

from services.common.errors import Code, FedmeshError
from services.demo import datasets
from services.demo.evaluation import local_only, pooled_test, score
from services.demo.synthetic import CohortFiles, generate
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.plans.library import plan_names, shipped_plan

PLAN = shipped_plan("readmission-logistic-private")
SMALL = (600, 300, 150, 100)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> CohortFiles:
    return generate(tmp_path_factory.mktemp("cohort"), SMALL)


def test_the_same_seed_gives_the_same_rows(cohort: CohortFiles, tmp_path: Path) -> None:
    again = generate(tmp_path, SMALL)
    other = generate(tmp_path / "other", SMALL, seed=7)
    assert _digest(again.encounters) == _digest(cohort.encounters) != _digest(other.encounters)
    assert again.partition.read_bytes() == cohort.partition.read_bytes()


def _digest(path: Path) -> str:
    rows = duckdb.read_parquet(str(path)).order("encounter_id").fetchall()
    return hashlib.sha256(repr(rows).encode()).hexdigest()


def test_hospitals_differ_in_size_and_case_mix(cohort: CohortFiles) -> None:
    with duckdb.connect() as connection:
        rows = connection.execute(
            "select hospital, count(distinct e.patient_nbr), avg((discharge_disposition_id = '1')::int) "
            f"from '{cohort.encounters}' e join read_csv('{cohort.partition}', all_varchar = true) p "
            "using (patient_nbr) group by hospital order by hospital::int"
        ).fetchall()
    assert [patients for _h, patients, _share in rows] == list(SMALL)
    shares = [share for _h, _patients, share in rows]
    assert max(shares) - min(shares) > 0.05


def test_every_plan_of_its_schema_reads_it_and_it_can_be_learnt(tmp_path: Path) -> None:
    files = generate(tmp_path, (3000, 2000))
    plans = [plan for plan in map(shipped_plan, plan_names()) if plan.feature_schema.name == "readmission"]
    assert len(plans) > 1
    for plan in plans:
        sets = [
            read_dataset(files.encounters, plan, partition=PartitionFile(path=files.partition, hospital=str(number)))
            for number in range(2)
        ]
        alone = local_only(sets, pooled_test(sets))
        assert alone.auroc_mean > 0.6


def test_scores_on_a_known_example() -> None:
    import numpy as np

    y = np.array([0, 0, 1, 1, 0, 0, 0, 0, 0, 1], dtype=np.float32)
    p = np.array([0.1, 0.4, 0.35, 0.8, 0.0, 0.0, 0.0, 0.0, 0.0, 0.2])
    scores = score(y, p, patients=9)
    # 21 pairs of one positive and one negative; (0.35, 0.4) and (0.2, 0.4) are the wrong way round.
    assert scores.auroc == pytest.approx(19 / 21)
    assert scores.recall_at_10pct == pytest.approx(1 / 3)
    assert scores.n_patients == 9


@pytest.mark.parametrize("missing", ["diabetic_data.parquet", "partition15.csv"])
def test_a_folder_that_lacks_a_file_says_which(cohort: CohortFiles, tmp_path: Path, missing: str) -> None:
    for path in (cohort.encounters, cohort.partition):
        if path.name != missing:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(FedmeshError, match=missing.split(".")[0]) as caught:
        datasets.from_folder(tmp_path, PLAN)
    assert caught.value.code is Code.DATA_INVALID


def test_columns_that_the_plan_misses_are_named_before_anything_starts(cohort: CohortFiles, tmp_path: Path) -> None:
    (tmp_path / "partition15.csv").write_bytes(cohort.partition.read_bytes())
    with duckdb.connect() as connection:
        connection.execute(
            f"copy (select * exclude (readmitted, discharge_disposition_id) from '{cohort.encounters}') "
            f"to '{tmp_path}/diabetic_data.csv' (header)"
        )
    with pytest.raises(FedmeshError, match=r"diabetic_data.csv lacks 2 columns: .*readmitted") as caught:
        datasets.from_folder(tmp_path, PLAN)
    assert caught.value.code is Code.DATA_INVALID
    assert "discharge_disposition_id" in caught.value.message


def test_a_partition_that_is_none_is_refused(cohort: CohortFiles, tmp_path: Path) -> None:
    (tmp_path / "diabetic_data.parquet").write_bytes(cohort.encounters.read_bytes())
    (tmp_path / "partition15.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FedmeshError, match="lacks 3 columns: patient_nbr, hospital, split"):
        datasets.from_folder(tmp_path, PLAN)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="no folder"):
        datasets.from_folder(tmp_path / "nowhere", PLAN)
