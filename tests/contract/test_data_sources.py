"""One cohort in every format that a hospital may have: the same feature rows, row by row."""

from pathlib import Path

import numpy as np
import psycopg

from services.hospital_node.config import DataConfig, FhirConfig, OmopConfig
from services.hospital_node.opening import opened_source
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.sources.reader import read_dataset
from services.plans.library import shipped_plan
from tests.support.clinic import made_up_clinic
from tests.support.clinic_fhir import write_fhir
from tests.support.clinic_omop import write_omop
from tests.support.clinic_rows import feature_rows, write_csv, write_parquet
from tests.support.stores import PostgresDatabase

PLANS = ("readmission-logistic", "readmission-logistic-private")


def read(plan: str, **data: object) -> Dataset:
    manifest = shipped_plan(plan)
    with opened_source(DataConfig.model_validate(data), manifest) as source:
        return read_dataset(source, manifest)


def require_same(data: Dataset, expected: Dataset) -> None:
    assert data.encounter_ids.tolist() == expected.encounter_ids.tolist()
    assert data.patient_ids.tolist() == expected.patient_ids.tolist()
    for name, wanted, found in zip(expected.feature_names, expected.x.T, data.x.T, strict=True):
        np.testing.assert_array_equal(found, wanted, err_msg=name)
    np.testing.assert_array_equal(data.y, expected.y)
    np.testing.assert_array_equal(data.split, expected.split)
    assert (data.rows_read, data.rows_excluded) == (expected.rows_read, expected.rows_excluded)


def test_every_source_gives_the_same_rows(tmp_path: Path, postgres: PostgresDatabase) -> None:
    clinic = made_up_clinic()
    rows = feature_rows(clinic)
    csv = write_csv(tmp_path / "rows.csv", rows)
    parquet = write_parquet(tmp_path / "rows.parquet", rows)
    fhir = write_fhir(tmp_path / "export", clinic)
    with psycopg.connect(postgres.dsn()) as connection:
        write_omop(connection, "cdm", clinic)
    secret = tmp_path / "dsn"
    secret.write_text(postgres.dsn())
    secret.chmod(0o600)
    for plan in PLANS:
        expected = read(plan, file=csv)
        assert len(expected.y) > 100
        assert 10 < expected.y.sum() < len(expected.y) - 10
        require_same(read(plan, file=parquet), expected)
        require_same(read(plan, fhir=FhirConfig(folder=fhir)), expected)
        require_same(read(plan, omop=OmopConfig(dsn_file=secret, cdm_schema="cdm")), expected)
