"""What a hospital is told when its OMOP database is not as it should be. A real PostgreSQL."""

from collections.abc import Iterator
from pathlib import Path

import duckdb
import numpy as np
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from services.common.errors import Code, FedmeshError
from services.hospital_node.config import DataConfig
from services.hospital_node.opening import opened_source
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.sources.reader import read_dataset
from services.plans.library import shipped_plan
from tests.support.clinic import made_up_clinic
from tests.support.clinic_omop import write_omop
from tests.support.stores import PostgresDatabase

PLAN = shipped_plan("readmission-logistic-private")
PASSWORD = "correct-horse"


@pytest.fixture
def dsn(postgres: PostgresDatabase) -> Iterator[str]:
    """A database with the tables, and a role that may read them."""
    with psycopg.connect(postgres.dsn()) as connection:
        write_omop(connection, "cdm", made_up_clinic(people=3))
        connection.execute(f"CREATE ROLE reader LOGIN PASSWORD '{PASSWORD}'".encode())
        connection.execute(f"GRANT CONNECT ON DATABASE {postgres.name} TO reader".encode())
        connection.execute("GRANT USAGE ON SCHEMA cdm TO reader; GRANT SELECT ON ALL TABLES IN SCHEMA cdm TO reader")
    yield make_conninfo(postgres.dsn("postgres"), user="reader", password=PASSWORD, passfile="/dev/null")
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("DROP OWNED BY reader; DROP ROLE reader")


def read(folder: Path, dsn: str, mode: int = 0o600, **omop: object) -> Dataset:
    secret = folder / "dsn"
    secret.write_text(dsn)
    secret.chmod(mode)
    data = DataConfig.model_validate({"omop": {"dsn_file": secret, "cdm_schema": "cdm", **omop}})
    with opened_source(data, PLAN) as source:
        return read_dataset(source, PLAN)


def refused(folder: Path, dsn: str, mode: int = 0o600, **omop: object) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        read(folder, dsn, mode, **omop)
    assert PASSWORD not in str(caught.value)
    return caught.value


def test_a_role_that_may_only_read_is_enough(tmp_path: Path, dsn: str) -> None:
    assert len(read(tmp_path, dsn).y) > 10


def test_the_database_is_only_read(tmp_path: Path, dsn: str, postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("ALTER TABLE cdm.death RENAME TO deaths")
        # A view that writes when it is read, as a careless or hostile database might have.
        connection.execute(
            "CREATE FUNCTION cdm.note() RETURNS boolean LANGUAGE sql AS "
            "$$ INSERT INTO cdm.deaths VALUES (1, '2000-01-01') RETURNING true $$;"
            "CREATE VIEW cdm.death AS SELECT * FROM cdm.deaths WHERE cdm.note();"
            "GRANT INSERT ON cdm.deaths TO reader; GRANT SELECT ON cdm.death TO reader"
        )
    error = refused(tmp_path, dsn)
    assert "read-only transaction" in error.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("DROP TABLE cdm.measurement", "the OMOP database lacks cdm.measurement"),
        (
            "ALTER TABLE cdm.visit_occurrence RENAME discharged_to_concept_id TO discharge_to_concept_id",
            "not in the layout of version 5.4: visit_occurrence has discharge_to_concept_id, as versions up to 5.3 had",
        ),
        ("UPDATE cdm.cdm_source SET cdm_version = '5.3.1'", "cdm_source says 5.3.1"),
        ("ALTER TABLE cdm.person DROP month_of_birth", "person lacks month_of_birth"),
        ("REVOKE SELECT ON cdm.drug_exposure FROM reader", "permission denied for table drug_exposure"),
        ("REVOKE USAGE ON SCHEMA cdm FROM reader", "permission denied for schema cdm"),
        ("TRUNCATE cdm.visit_occurrence", "no finished inpatient stay"),
    ],
)
def test_a_database_that_does_not_fit_is_explained(
    tmp_path: Path, dsn: str, postgres: PostgresDatabase, change: str, expected: str
) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute(change.encode())
    error = refused(tmp_path, dsn)
    assert error.code in (Code.CONFIG_INVALID, Code.DATA_INVALID)
    assert expected in error.message


def test_without_the_table_of_procedures_their_number_is_missing(
    tmp_path: Path, dsn: str, postgres: PostgresDatabase
) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("DROP TABLE cdm.procedure_occurrence")
    assert len(read(tmp_path, dsn).y) > 10
    full = shipped_plan("readmission-logistic")
    data = DataConfig.model_validate({"omop": {"dsn_file": tmp_path / "dsn", "cdm_schema": "cdm"}})
    with opened_source(data, full) as source, pytest.raises(FedmeshError, match=r"'num_procedures'.*is missing"):
        read_dataset(source, full)


def test_values_and_dates_that_cannot_be_change_nothing(tmp_path: Path, dsn: str, postgres: PostgresDatabase) -> None:
    """NaN is above every limit; a visit of the next century would be the next stay of everybody."""
    full = shipped_plan("readmission-logistic")

    def changed(*statements: str) -> Dataset:
        with psycopg.connect(postgres.dsn()) as connection:
            for statement in statements:
                assert connection.execute(statement.encode()).rowcount > 3
        read(tmp_path, dsn)
        data = DataConfig.model_validate({"omop": {"dsn_file": tmp_path / "dsn", "cdm_schema": "cdm"}})
        with opened_source(data, full) as source:
            return read_dataset(source, full)

    before = changed(
        "UPDATE cdm.measurement SET value_as_number = NULL", "UPDATE cdm.drug_exposure SET quantity = NULL"
    )
    after = changed(
        "UPDATE cdm.measurement SET value_as_number = 'NaN'",
        "UPDATE cdm.drug_exposure SET quantity = CASE WHEN drug_exposure_id % 2 = 0 THEN 'NaN'::numeric END",
        "INSERT INTO cdm.visit_occurrence SELECT 100000 + person_id, person_id, 9201, 32817, DATE '2124-01-01',"
        " DATE '2124-02-01', 0, 0 FROM cdm.person",
        "INSERT INTO cdm.visit_occurrence SELECT 200000 + person_id, person_id, 9201, 32817, DATE '2024-03-20',"
        " DATE '2024-03-10', 0, 0 FROM cdm.person",
    )
    assert after.encounter_ids.tolist() == before.encounter_ids.tolist()
    np.testing.assert_array_equal(after.x, before.x)
    np.testing.assert_array_equal(after.y, before.y)
    data = DataConfig.model_validate({"omop": {"dsn_file": tmp_path / "dsn", "cdm_schema": "cdm"}})
    with opened_source(data, full) as source, duckdb.connect() as database:
        notes = source.load(database, ["patient_nbr", "encounter_id"]).notes
    people = len(made_up_clinic(people=3).people)
    assert notes == (
        f"{people} visits end before they begin",
        f"{people} visits begin after the last day that counts (data.until, or today)",
    )


def test_a_statement_that_takes_too_long_is_ended(tmp_path: Path, dsn: str, postgres: PostgresDatabase) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("ALTER TABLE cdm.death RENAME TO deaths")
        connection.execute("CREATE VIEW cdm.death AS SELECT d.* FROM cdm.deaths d, pg_sleep(600)")
        connection.execute("GRANT SELECT ON cdm.death TO reader")
    error = refused(tmp_path, dsn, statement_timeout_s=1)
    assert error.code is Code.STORE_UNAVAILABLE
    assert "statement_timeout_s = 1 s" in error.message


def test_an_unreachable_database_is_no_verdict_on_the_data(tmp_path: Path, dsn: str) -> None:
    error = refused(tmp_path, make_conninfo(dsn, host=str(tmp_path)))
    assert error.retryable
    assert "cannot be reached" in error.message
    assert refused(tmp_path, make_conninfo(dsn, password="wrong")).retryable


def test_the_connection_string_is_a_secret(tmp_path: Path, dsn: str) -> None:
    assert "chmod 600" in refused(tmp_path, dsn, mode=0o644).message
    error = refused(tmp_path, f"host=/tmp passwort={PASSWORD}")
    assert error.code is Code.CONFIG_INVALID
    assert "dsn_file" in error.message
