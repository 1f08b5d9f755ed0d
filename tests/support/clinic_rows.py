"""The feature rows of a made-up clinic, computed in plain Python: what every source has to give."""

import csv
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import duckdb

from tests.support.clinic import END_OF_DATA, VITAL, Clinic, Lab, Person, Visit

DISCHARGES = {
    "home": "1",
    "hospital": "2",
    "snf": "3",
    "intermediate": "4",
    "home-health": "6",
    "rehab": "22",
    "long-term": "23",
    "psych": "28",
    "hospice": "14",
    "expired": "11",
}
_RACES = {"white": "Caucasian", "black": "AfricanAmerican", "asian": "Asian", "hispanic": "Hispanic"}
_RACES |= {"pacific": "Other", "native": "Other"}
_ADMITTED_FROM = {"": "", "hospital": "4", "nursing": "5", "office": "1", "clinic": "2", "rehab": "6"}
_ADMITTED_FROM["emergency"] = "7"
_GROUPS = {
    "428.0": "428.0",
    "25080": "250.80",
    "486": "486",
    "V57.89": "V57",
    "E888.9": "E88",
    "E9289": "E92",
    "I50.9": "428",
    "E11.65": "250.9",
    "E11.9": "250",
    "N18.6": "586",
    "M17.11": "729",
    "U07.1": "U071",
}
_INGREDIENTS = (
    "insulin",
    "metformin",
    "repaglinide",
    "nateglinide",
    "glimepiride",
    "glipizide",
    "glyburide",
    "pioglitazone",
    "rosiglitazone",
    "acarbose",
)


def feature_rows(clinic: Clinic) -> list[dict[str, str]]:
    """One row for each index stay, in the order of patient and encounter id as texts."""
    people = {person.number: person for person in clinic.people}
    visits: dict[int, list[Visit]] = defaultdict(list)
    for visit in sorted(clinic.visits, key=lambda item: (item.start, item.end, str(item.number))):
        visits[visit.person].append(visit)
    rows = [row for number, person in people.items() for row in _rows_of(person, visits[number])]
    return sorted(rows, key=lambda row: (row["patient_nbr"], row["encounter_id"]))


def write_csv(path: Path, rows: list[dict[str, str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: list[dict[str, str]]) -> Path:
    text = write_csv(path.with_suffix(".source.csv"), rows)
    duckdb.sql(f"COPY (SELECT * FROM read_csv('{text}', all_varchar = true)) TO '{path}' (FORMAT parquet)")
    return path


def _rows_of(person: Person, visits: list[Visit]) -> list[dict[str, str]]:
    stays: list[list[Visit]] = []
    for visit in visits:
        if visit.kind != "inpatient":
            continue
        if stays and visit.start <= max(item.end for item in stays[-1]):
            stays[-1].append(visit)
        else:
            stays.append([visit])
    rows = []
    for position, stay in enumerate(stays):
        end = max(visit.end for visit in stay)
        gap = (stays[position + 1][0].start - end).days if position + 1 < len(stays) else None
        died_after = (person.death - end).days if person.death else None
        followed = (END_OF_DATA - end).days
        if any(visit.goes_on for visit in stay):
            continue
        if gap is None and followed < 30 and (died_after is None or died_after > 30):
            continue
        rows.append(_row(person, stay, [item[0] for item in stays], visits, gap, died_after))
    return rows


def _row(
    person: Person, stay: list[Visit], stays: list[Visit], visits: list[Visit], gap: int | None, died_after: int | None
) -> dict[str, str]:
    start, end = stay[0].start, max(visit.end for visit in stay)
    last = max(stay, key=lambda visit: (visit.end, visit.start, str(visit.number)))
    year_before = start - timedelta(days=365)

    def before(kind: str) -> str:
        return str(sum(visit.kind == kind and year_before <= visit.start < start for visit in visits))

    ordered = sorted(stay, key=lambda visit: (visit.start, visit.number))
    # The first diagnosis of a visit is its primary one: primaries come first, then day and entry.
    placed = [
        ((index > 0, visit.start, visit.number, index), _GROUPS[code])
        for visit in ordered
        for index, (_, code) in enumerate(visit.diagnoses)
    ]
    codes = list(dict.fromkeys(code for _, code in sorted(placed)))
    age = start.year - person.birth.year - ((start.month, start.day) < (person.birth.month, person.birth.day))
    decade = min(9, age // 10)
    return {
        "patient_nbr": str(person.number),
        "encounter_id": str(stay[0].number),
        "readmitted": "NO" if gap is None else "<30" if gap <= 30 else ">30",
        "discharge_disposition_id": "11" if died_after is not None and died_after <= 0 else DISCHARGES[last.discharge],
        "number_inpatient": str(sum(year_before <= other.start < start for other in stays)),
        "number_emergency": before("emergency"),
        "number_outpatient": before("outpatient"),
        "number_diagnoses": str(len(codes)),
        "time_in_hospital": str(max(1, (end - start).days)),
        "num_procedures": str(sum(visit.procedures for visit in stay)),
        "age": f"[{10 * decade}-{10 * decade + 10})",
        "gender": person.sex.capitalize(),
        "race": _RACES.get(person.race, ""),
        "admission_type_id": "1" if stay[0].from_emergency_room else "",
        "admission_source_id": "7" if stay[0].from_emergency_room else _ADMITTED_FROM[stay[0].admitted_from],
        "payer_code": "",
        "medical_specialty": "",
        **{f"diag_{number}": code for number, code in enumerate((*codes, "", "", "")[:3], start=1)},
        **_drug_columns(ordered),
        **_lab_columns(stay),
    }


def _drug_columns(stay: list[Visit]) -> dict[str, str]:
    drugs = [drug for visit in stay for drug in visit.drugs]
    names = {drug.name: drug.name.replace("glibenclamide", "glyburide") for drug in drugs}
    courses = {}
    for ingredient in (*_INGREDIENTS, "gliptin"):
        doses = [drug.dose for drug in drugs if ingredient in names[drug.name]]
        if doses:
            courses[ingredient] = "Up" if doses[-1] > doses[0] else "Down" if doses[-1] < doses[0] else "Steady"
    return {
        "num_medications": str(len({drug.name for drug in drugs})),
        "change": "Ch" if {"Up", "Down"} & set(courses.values()) else "No",
        "diabetesMed": "Yes" if courses else "No",
        **{ingredient: courses.get(ingredient, "No") for ingredient in _INGREDIENTS},
    }


def _lab_columns(stay: list[Visit]) -> dict[str, str]:
    labs = [lab for visit in stay for lab in visit.labs if lab.loinc != VITAL[0]]
    a1c = [_a1c_percent(lab) for lab in labs if lab.loinc in ("4548-4", "17856-6", "59261-8")]
    sugar = [lab for lab in labs if lab.loinc in ("2345-7", "2339-0", "14749-6")]
    glucose = [18.016 * lab.value if lab.unit == "mmol/L" else lab.value for lab in sugar]

    def result(values: list[float], *limits: int) -> str:
        over = [limit for limit in limits if values and max(values) > limit]
        return f">{max(over)}" if over else "Norm" if values else ""

    return {
        "num_lab_procedures": str(len(labs)),
        "A1Cresult": result(a1c, 7, 8),
        "max_glu_serum": result(glucose, 200, 300),
    }


def _a1c_percent(lab: Lab) -> float:
    """NGSP from IFCC by the master equation."""
    return 0.09148 * lab.value + 2.152 if lab.unit == "mmol/mol" else lab.value
