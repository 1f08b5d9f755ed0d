"""A made-up clinic in the tables of the OMOP CDM v5.4."""

from typing import Any

import psycopg
from psycopg import sql

from tests.support.clinic import DRUGS, END_OF_DATA, LABS, VITAL, Clinic, Visit

# The columns of the CDM that matter here, with the CDM's types.
TABLES = """
CREATE TABLE {0}.person (person_id integer PRIMARY KEY, gender_concept_id integer NOT NULL,
  year_of_birth integer NOT NULL, month_of_birth integer, day_of_birth integer, race_concept_id integer NOT NULL,
  ethnicity_concept_id integer NOT NULL);
CREATE TABLE {0}.visit_occurrence (visit_occurrence_id integer PRIMARY KEY, person_id integer NOT NULL,
  visit_concept_id integer NOT NULL, visit_start_date date NOT NULL, visit_end_date date NOT NULL,
  admitted_from_concept_id integer, discharged_to_concept_id integer);
CREATE TABLE {0}.condition_occurrence (condition_occurrence_id integer PRIMARY KEY, visit_occurrence_id integer,
  condition_status_concept_id integer, condition_source_value varchar(50), condition_source_concept_id integer);
CREATE TABLE {0}.drug_exposure (drug_exposure_id integer PRIMARY KEY, visit_occurrence_id integer,
  drug_concept_id integer NOT NULL, drug_exposure_start_date date NOT NULL, quantity numeric, days_supply integer,
  drug_source_value varchar(50));
CREATE TABLE {0}.measurement (measurement_id integer PRIMARY KEY, visit_occurrence_id integer,
  measurement_concept_id integer NOT NULL, value_as_number numeric, unit_concept_id integer);
CREATE TABLE {0}.procedure_occurrence (procedure_occurrence_id integer PRIMARY KEY, visit_occurrence_id integer);
CREATE TABLE {0}.observation_period (person_id integer NOT NULL, observation_period_start_date date NOT NULL,
  observation_period_end_date date NOT NULL);
CREATE TABLE {0}.death (person_id integer PRIMARY KEY, death_date date NOT NULL);
CREATE TABLE {0}.concept (concept_id integer PRIMARY KEY, concept_name varchar(255) NOT NULL, vocabulary_id varchar(20),
  concept_class_id varchar(20), concept_code varchar(50));
CREATE TABLE {0}.cdm_source (cdm_source_name varchar(255), cdm_version varchar(10));
INSERT INTO {0}.cdm_source VALUES ('made up', 'v5.4.1');
"""
_VISITS = {"inpatient": 9201, "emergency": 9203, "outpatient": 9202}
_DISCHARGES = {"home": 8536, "hospital": 8717, "snf": 8863, "rehab": 8920, "psych": 8971, "hospice": 8546}
_DISCHARGES["expired"] = 4216643
_RACES = {"white": 8527, "black": 8516, "asian": 8515}
_UNITS = {unit: 700 + number for number, unit in enumerate(sorted({lab[1] for lab in (*LABS, VITAL)}))}
_TESTS = {code: 800 + number for number, code in enumerate(sorted({lab[0] for lab in (*LABS, VITAL)}))}


def write_omop(connection: "psycopg.Connection[Any]", schema: str, clinic: Clinic) -> None:
    """Make the schema with its tables and fill them."""
    connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(schema)))
    connection.execute(TABLES.format(schema).encode())
    _insert(connection, schema, "concept", _concepts(clinic))
    people = [
        (
            person.number,
            {"male": 8507, "female": 8532}[person.sex],
            person.birth.year,
            person.birth.month,
            person.birth.day,
            _RACES.get(person.race, 0),
            38003563 if person.race == "hispanic" else 38003564,
        )
        for person in clinic.people
    ]
    _insert(connection, schema, "person", people)
    _insert(connection, schema, "death", [(item.number, item.death) for item in clinic.people if item.death])
    periods = [(person.number, person.birth, END_OF_DATA) for person in clinic.people]
    _insert(connection, schema, "observation_period", periods)
    _insert(connection, schema, "visit_occurrence", [_visit(visit) for visit in clinic.visits])
    _write_events(connection, schema, clinic)


def _write_events(connection: "psycopg.Connection[Any]", schema: str, clinic: Clinic) -> None:
    conditions: list[tuple[object, ...]] = []
    drugs: list[tuple[object, ...]] = []
    labs: list[tuple[object, ...]] = []
    procedures: list[tuple[object, ...]] = []
    for visit in clinic.visits:
        for index, (system, code) in enumerate(visit.diagnoses):
            # Every second code has a concept, the others stand in the source value alone.
            concept = _icd_concept(system, code)
            status = 32902 if index == 0 else 32908
            conditions.append((len(conditions) + 1, visit.number, status, code, concept))
        for drug in visit.drugs:
            concept = 900 + DRUGS.index(drug.name)
            drugs.append((len(drugs) + 1, visit.number, concept, visit.start, drug.dose * 3, 3, None))
        for lab in visit.labs:
            labs.append((len(labs) + 1, visit.number, _TESTS[lab.loinc], lab.value, _UNITS[lab.unit]))
        for _ in range(visit.procedures):
            procedures.append((len(procedures) + 1, visit.number))
    _insert(connection, schema, "condition_occurrence", conditions)
    _insert(connection, schema, "drug_exposure", drugs)
    _insert(connection, schema, "measurement", labs)
    _insert(connection, schema, "procedure_occurrence", procedures)


def _visit(visit: Visit) -> tuple[object, ...]:
    kind = 262 if visit.from_emergency_room else _VISITS[visit.kind]
    discharge = _DISCHARGES[visit.discharge] if visit.kind == "inpatient" else None
    return visit.number, visit.person, kind, visit.start, visit.end, None, discharge


def _concepts(clinic: Clinic) -> list[tuple[object, ...]]:
    tests = [
        (number, code, "LOINC", "Clinical Observation" if code == VITAL[0] else "Lab Test", code)
        for code, number in _TESTS.items()
    ]
    codes = {item for visit in clinic.visits for item in visit.diagnoses}
    return [
        *[(number, unit, "UCUM", "Unit", unit) for unit, number in _UNITS.items()],
        *tests,
        *[(900 + number, name, "RxNorm", "Clinical Drug", f"rx{number}") for number, name in enumerate(DRUGS)],
        *[
            (number, code, {"ICD-9": "ICD9CM", "ICD-10": "ICD10CM"}[system], "billing code", code)
            for system, code in sorted(codes)
            if (number := _icd_concept(system, code))
        ],
        # One of the millions that nobody asks for.
        (999999, "unused", "SNOMED", "Disorder", "0"),
    ]


def _icd_concept(system: str, code: str) -> int:
    number = sum(map(ord, system + code))
    return 0 if number % 2 else 10_000 + number


def _insert(connection: "psycopg.Connection[Any]", schema: str, table: str, rows: list[tuple[Any, ...]]) -> None:
    with connection.cursor() as cursor:
        query = sql.SQL("COPY {} FROM STDIN").format(sql.Identifier(schema, table))
        with cursor.copy(query) as copy:
            for row in rows:
                copy.write_row(row)
