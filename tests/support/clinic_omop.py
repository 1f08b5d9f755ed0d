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
  visit_concept_id integer NOT NULL, visit_type_concept_id integer NOT NULL, visit_start_date date NOT NULL,
  visit_end_date date NOT NULL,
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
# All concepts that mean the same to the mapping; which of them a visit has follows from its number.
_VISITS = {
    "inpatient": (9201, 8717, 32037, 581379),
    "emergency": (9203, 8870),
    "outpatient": (9202, 581477, 8756, 581476, 5083),
}
_DISCHARGES: dict[str, tuple[int | None, ...]] = {
    "home": (0, None, 8536, 581476),
    "hospital": (8717, 9201),
    "snf": (8863,),
    "intermediate": (8676,),
    "home-health": (38004519,),
    "rehab": (8920,),
    "long-term": (8970,),
    "psych": (8971,),
    "hospice": (8546,),
    "expired": (4216643,),
}
_ADMITTED_FROM: dict[str, tuple[int | None, ...]] = {
    "": (0, None),
    "hospital": (8717, 9201),
    "nursing": (8863, 8676),
    "office": (8940, 581477),
    "clinic": (9202, 8756),
    "rehab": (8920, 8970, 8971),
    "emergency": (8870, 9203),
}
# From a registration and from a claim; 32220: still patient.
_ENDED, _GOES_ON = 32817, 32220
_STATUSES = (32902, 32901, 32903)
_RACES = {"white": 8527, "black": 8516, "asian": 8515, "pacific": 8557, "native": 8657}
_ICD10 = ("ICD10CM", "ICD10", "ICD10GM")
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
        # The primary one, the first, is entered last: that it counts first follows from its status alone.
        for index, (system, code) in (*enumerate(visit.diagnoses[1:], 1), *enumerate(visit.diagnoses[:1])):
            # Every second code has a concept, the others stand in the source value alone.
            concept = _icd_concept(system, code)
            status = _STATUSES[visit.number % 3] if index == 0 else 32908
            # As claims have it: ICD-10 without the dot.
            value = code if concept or system == "ICD-9" else code.replace(".", "")
            conditions.append((len(conditions) + 1, visit.number, status, value, concept))
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
    kind = 262 if visit.from_emergency_room else _one_of(_VISITS[visit.kind], visit)
    discharge = _one_of(_DISCHARGES[visit.discharge], visit) if visit.kind == "inpatient" else None
    admitted = _one_of(_ADMITTED_FROM[visit.admitted_from], visit)
    recorded = _GOES_ON if visit.goes_on else _ENDED
    return visit.number, visit.person, kind, recorded, visit.start, visit.end, admitted, discharge


def _one_of(concepts: tuple[int | None, ...], visit: Visit) -> int | None:
    # Divided first: which of them it is must not hang together with what else follows from the number.
    return concepts[visit.number // 7 % len(concepts)]


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
            (number, code, "ICD9CM" if system == "ICD-9" else _ICD10[number // 2 % 3], "billing code", code)
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
