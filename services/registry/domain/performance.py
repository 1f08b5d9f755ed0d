"""What is measured of versions over time: of the joint model, and of each hospital in a round.

No hospital's own loss or AUROC exists at the centre (ADR 5). Of a hospital there is what the centre sees by itself, and
the figures of the checks that the hospital signed, which every hospital computes alike from the opened sum.
"""

from dataclasses import dataclass
from datetime import date, datetime
from typing import Final
from uuid import UUID

from services.registry.domain.entities import CommittedRound, Job
from services.transparency.findings import Findings

JOINT: Final = ""
"""The `hospital_id` of what was measured of the joint model."""
MAX_NAME: Final = 100
CONTRIBUTED: Final = "contributed"
AGE: Final = "contribution_age"
AGREED: Final = "agreed"


@dataclass(frozen=True)
class Measurement:
    """One number. hospital_id: whose it is, or JOINT. version: also the round's number."""

    hospital_id: str
    job_id: UUID
    version: int
    name: str
    value: float
    recorded_at: datetime


@dataclass(frozen=True)
class DailyMeasurement:
    """What was measured on one day, UTC; points: how many numbers, at least 1."""

    hospital_id: str
    name: str
    day: date
    points: int
    lowest: float
    highest: float
    mean: float


@dataclass(frozen=True)
class Subject:
    """Which numbers: of one job, or of the jobs of a model, which is what plans of one name make. Of one name and one
    hospital, or of all where these are None.
    """

    job_id: UUID | None = None
    model: str | None = None
    name: str | None = None
    hospital_id: str | None = None


def of_round(job: Job, committed: CommittedRound) -> list[Measurement]:
    """What a round tells of each hospital of the job's cohort.

    `contributed`: 1 when its contribution was counted, else 0. Of those that contributed, `contribution_age`: by how
    many versions the one that it trained on was behind; and, unless the round was burnt, `agreed`: 1 when it signed the
    sum's digest that stands, else 0.
    """
    told = committed.round
    ages = {item.hospital_id: item.age for item in told.contributions}
    found = [(name, CONTRIBUTED, float(name in ages)) for name in job.hospital_ids]
    found += [(name, AGE, float(age)) for name, age in ages.items()]
    if not told.burnt:
        found += [(name, AGREED, float(name in told.agreeing)) for name in ages]
    return [
        Measurement(hospital, told.job_id, told.version, name, value, committed.committed_at)
        for hospital, name, value in found
    ]


def of_checks(found: Findings, job_id: UUID, at: datetime) -> list[Measurement]:
    """The figures of a hospital's signed checks, as `<check>.<figure>`; names beyond MAX_NAME are left out."""
    figures = ((f"{item.check}.{name}", value) for item in found.findings for name, value in item.figures.items())
    return [
        Measurement(found.hospital_id, job_id, found.version, name, value, at)
        for name, value in figures
        if len(name) <= MAX_NAME
    ]
