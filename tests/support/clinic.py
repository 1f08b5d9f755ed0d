"""A small made-up hospital: patients, visits and what happened in them, to be written in every format that can be read.

Nobody in it exists. Some patients are drawn at random; others are the cases in which definitions of readmission differ.
"""

import random
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from typing import Final

END_OF_DATA: Final = date(2024, 12, 31)
DRUGS: Final = (
    "insulin glargine 100 UNT/ML Injection",
    "metformin hydrochloride 500 MG Oral Tablet",
    "glyburide 5 MG / metformin 500 MG Oral Tablet",
    "glipizide 5 MG Oral Tablet",
    "glibenclamide 5 MG Oral Tablet",
    "repaglinide 1 MG Oral Tablet",
    "nateglinide 60 MG Oral Tablet",
    "glimepiride 2 MG Oral Tablet",
    "pioglitazone 15 MG Oral Tablet",
    "rosiglitazone 4 MG Oral Tablet",
    "acarbose 50 MG Oral Tablet",
    "sitagliptin 100 MG Oral Tablet",
    "lisinopril 10 MG Oral Tablet",
    "atorvastatin 20 MG Oral Tablet",
)
DIAGNOSES: Final = (
    ("ICD-9", "428.0"),
    ("ICD-9", "25080"),
    ("ICD-9", "486"),
    ("ICD-9", "V57.89"),
    ("ICD-9", "E888.9"),
    ("ICD-9", "E9289"),
    ("ICD-10", "I50.9"),
    ("ICD-10", "E11.65"),
    ("ICD-10", "E11.9"),
    ("ICD-10", "N18.6"),
    ("ICD-10", "M17.11"),
    ("ICD-10", "U07.1"),
)
# LOINC code, unit, lowest and highest value; the last is a vital sign and no laboratory test.
LABS: Final = (
    ("4548-4", "%", 5, 11),
    ("2345-7", "mg/dL", 70, 400),
    ("2345-7", "mmol/L", 4, 20),
    ("17856-6", "%", 5, 11),
    ("59261-8", "mmol/mol", 30, 100),
    ("2339-0", "mg/dL", 70, 400),
    ("14749-6", "mmol/L", 4, 20),
    ("718-7", "g/dL", 8, 17),
)
WAYS: Final = (
    *("home", "home", "home", "home-health", "hospital", "snf", "intermediate", "rehab", "long-term", "psych"),
    *("hospice", "expired"),
)
VITAL: Final = ("8867-4", "/min", 50, 120)


@dataclass(frozen=True)
class Person:
    number: int
    sex: str
    race: str
    birth: date
    death: date | None = None


@dataclass(frozen=True)
class Drug:
    name: str
    dose: float


@dataclass(frozen=True)
class Lab:
    loinc: str
    value: float
    unit: str


@dataclass(frozen=True)
class Visit:
    """kind: inpatient, emergency or outpatient; discharge: one of `WAYS`; goes_on: not discharged when the data ends,
    whatever `end` is."""

    number: int
    person: int
    kind: str
    start: date
    end: date
    from_emergency_room: bool = False
    discharge: str = "home"
    diagnoses: tuple[tuple[str, str], ...] = ()
    drugs: tuple[Drug, ...] = ()
    labs: tuple[Lab, ...] = ()
    procedures: int = 0
    goes_on: bool = False

    @property
    def admitted_from(self) -> str:
        """Of a stay that does not come from the emergency room; empty: not recorded."""
        if self.kind != "inpatient" or self.from_emergency_room:
            return ""
        return ("", "hospital", "nursing", "office", "clinic", "rehab", "emergency")[self.number % 7]


@dataclass
class Clinic:
    people: list[Person] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)

    def person(self, draw: random.Random, death: date | None = None) -> int:
        number = 1001 + len(self.people)
        birth = date(1925, 1, 1) + timedelta(days=draw.randrange(80 * 365))
        race = draw.choice(["white", "black", "asian", "hispanic", "pacific", "native", "unknown"])
        self.people.append(Person(number, draw.choice(["male", "female"]), race, birth, death))
        return number

    def visit(
        self, draw: random.Random, person: int, kind: str, start: date, days: int, discharge: str = "home"
    ) -> None:
        number = 50001 + len(self.visits)
        stay = kind == "inpatient"
        drugs = tuple(
            Drug(draw.choice(DRUGS), draw.choice([1.0, 2.0, 4.0])) for _ in range(draw.randrange(6) if stay else 1)
        )
        picked = [draw.choice((*LABS, VITAL)) for _ in range(draw.randrange(8))]
        self.visits.append(
            Visit(
                number,
                person,
                kind,
                start,
                start + timedelta(days=days),
                stay and draw.random() < 0.5,
                discharge,
                tuple(draw.sample(DIAGNOSES, draw.randrange(1, 6))),
                drugs,
                tuple(Lab(code, round(draw.uniform(low, high), 1), unit) for code, unit, low, high in picked),
                draw.randrange(4) if stay else 0,
            )
        )


def made_up_clinic(people: int = 90, seed: int = 7) -> Clinic:
    """The cases below, and `people` patients at random. The same for the same arguments."""
    draw, clinic = random.Random(seed), Clinic()
    _add_cases(draw, clinic)
    for _ in range(people):
        person = clinic.person(draw, END_OF_DATA - timedelta(days=draw.randrange(60)) if draw.random() < 0.1 else None)
        last = clinic.people[-1].death or END_OF_DATA
        for _ in range(draw.randrange(1, 8)):
            kind = draw.choice(["inpatient", "inpatient", "emergency", "outpatient"])
            days = draw.randrange(12) if kind == "inpatient" else 0
            start = last - timedelta(days=days + draw.randrange(500))
            clinic.visit(draw, person, kind, start, days, draw.choice(WAYS) if kind == "inpatient" else "home")
    return clinic


def _add_cases(draw: random.Random, clinic: Clinic) -> None:
    first = date(2024, 3, 1)

    def stays(*gaps: int, death: int | None = None, discharge: str = "home") -> None:
        """Stays of two days, `gaps` days after each other's end; death so many days after the last one."""
        start, numbers = first, []
        for gap in (*gaps, 0):
            numbers.append(start)
            start += timedelta(days=2 + gap)
        last = numbers[-1] + timedelta(days=2)
        person = clinic.person(draw, None if death is None else last + timedelta(days=death))
        for begin in numbers:
            clinic.visit(draw, person, "inpatient", begin, 2, discharge)

    stays(30)
    stays(31)
    stays(0, 5)  # a transfer, then a readmission
    stays(death=0)
    stays(death=30)
    stays(death=31)
    stays(discharge="expired")
    stays(discharge="hospice")
    person = clinic.person(draw)
    for days in (365, 366):
        clinic.visit(draw, person, "emergency", first - timedelta(days=days), 0)
    clinic.visit(draw, person, "inpatient", first, 3)
    clinic.visit(draw, person, "inpatient", first + timedelta(days=1), 1)  # within the stay before
    # Discharged 29 days before the data ends: readmitted, not known, or dead.
    for again, death in ((True, None), (False, None), (False, END_OF_DATA - timedelta(days=3))):
        person = clinic.person(draw, death)
        clinic.visit(draw, person, "inpatient", END_OF_DATA - timedelta(days=31), 2)
        if again:
            clinic.visit(draw, person, "inpatient", END_OF_DATA - timedelta(days=9), 2)
    clinic.visit(draw, clinic.person(draw), "outpatient", END_OF_DATA, 0)
    # Readmitted, and still there when the data ends: one index stay. The end that some formats demand says nothing.
    person = clinic.person(draw)
    clinic.visit(draw, person, "inpatient", END_OF_DATA - timedelta(days=80), 2)
    clinic.visit(draw, person, "inpatient", END_OF_DATA - timedelta(days=60), 2)
    clinic.visits[-1] = replace(clinic.visits[-1], goes_on=True)
    # 198 mg/dL: normal by the true factor, and over 200 by a rough one.
    number, glucose = 50001 + len(clinic.visits), Lab("2345-7", 11.0, "mmol/L")
    person = clinic.person(draw)
    clinic.visits.append(Visit(number, person, "inpatient", first, first, diagnoses=(DIAGNOSES[0],), labs=(glucose,)))
