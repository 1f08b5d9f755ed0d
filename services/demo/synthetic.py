"""A deterministic SYNTHETIC multi-hospital cohort in the file form of the public diabetes-130 data.

Nobody in it exists. Marginals are round numbers in the neighbourhood of published summaries (Strack et al. 2014), the
outcome follows a known logistic model with a random effect for each patient, and the fifteen hospitals differ in size
and case mix. It exists so that a fresh clone can run the whole path; figures on it say nothing about medicine.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from services.demo.storage import storing, write_table

# Patients of each hospital: a few large, many small, as in a real consortium.
SIZES: Final = (16000, 15000, 7000, 5200, 4200, 3800, 3000, 2900, 2200, 1900, 1500, 1400, 1200, 900, 800)
SEED: Final = 130

Strings = npt.NDArray[np.str_]
Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_DRUGS: Final = (
    *("metformin", "repaglinide", "nateglinide", "chlorpropamide", "glimepiride", "acetohexamide", "glipizide"),
    *("glyburide", "tolbutamide", "pioglitazone", "rosiglitazone", "acarbose", "miglitol", "troglitazone"),
    *("tolazamide", "examide", "citoglipton", "insulin", "glyburide-metformin", "glipizide-metformin"),
    *("glimepiride-pioglitazone", "metformin-rosiglitazone", "metformin-pioglitazone"),
)
_AGES: Final = tuple(f"[{low}-{low + 10})" for low in range(0, 100, 10))
_DIAGNOSES: Final = {
    "428": 0.08, "414": 0.08, "410": 0.05, "786": 0.07, "486": 0.06, "491": 0.05, "434": 0.05, "682": 0.05,
    "250.8": 0.05, "250.02": 0.05, "584": 0.05, "599": 0.06, "715": 0.05, "577": 0.04, "296": 0.03, "996": 0.05,
    "V57": 0.03, "276": 0.05, "780": 0.05,
}  # fmt: skip


@dataclass(frozen=True)
class CohortFiles:
    """Where a cohort lies: encounters (Parquet) and the assignment of patients to hospitals (CSV)."""

    encounters: Path
    partition: Path


def generate(folder: Path, sizes: Sequence[int] = SIZES, seed: int = SEED) -> CohortFiles:
    """Write the cohort into a folder. The same sizes and seed give the same files.

    sizes: patients of each hospital; at least one each.

    Raises: FedmeshError(STORE_FULL, CONFIG_INVALID) when the folder is full or cannot be written.
    """
    rng = np.random.default_rng(seed)
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    tables: list[Mapping[str, npt.NDArray[np.generic]]] = []
    partitions = []
    first_patient, first_encounter = 1_000_000, 50_000_000
    for hospital, patients in enumerate(sizes):
        numbers = np.arange(first_patient, first_patient + patients)
        stays = np.minimum(rng.geometric(0.72, patients), 6)
        table = _encounters(rng, hospital, np.repeat(numbers, stays), stays, first_encounter)
        tables.append(table)
        partitions.append(
            {
                "patient_nbr": numbers.astype(str),
                "hospital": np.full(patients, hospital).astype(str),
                "split": rng.choice(["train", "val", "test"], patients, p=[0.7, 0.1, 0.2]),
            }
        )
        first_patient += patients
        first_encounter += int(stays.sum())
    files = CohortFiles(folder / "diabetic_data.parquet", folder / "partition15.csv")
    write_table(files.encounters, "parquet", _joined(tables))
    write_table(files.partition, "csv", _joined(partitions))
    return files


def _joined(tables: Sequence[Mapping[str, npt.NDArray[np.generic]]]) -> dict[str, npt.NDArray[np.generic]]:
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


def _encounters(
    rng: np.random.Generator, hospital: int, patients: Integers, stays: Integers, first_encounter: int
) -> dict[str, npt.NDArray[np.generic]]:
    """All columns of one hospital's encounters, one row an encounter, as strings."""
    count = len(patients)
    # Covariate shift: hospitals differ in age, referral, payer and in how ill their patients arrive.
    mix = np.random.default_rng([SEED, hospital]).normal(size=6)
    age = np.clip(rng.normal(65 + 4 * mix[0], 14, len(stays)), 0, 99)[np.repeat(np.arange(len(stays)), stays)]
    frailty = np.repeat(rng.normal(0, 1, len(stays)), stays)
    inpatient = np.minimum(rng.poisson(np.exp(-0.75 + 0.55 * frailty + 0.2 * mix[1])), 12)
    emergency = np.minimum(rng.poisson(np.exp(-2.1 + 0.6 * frailty + 0.3 * mix[2])), 12)
    outpatient = np.minimum(rng.poisson(np.exp(-1.6 + 0.4 * frailty)), 12)
    days = np.clip(np.round(np.exp(rng.normal(1.25 + 0.1 * frailty, 0.6))), 1, 14)
    number_diagnoses = np.clip(np.round(rng.normal(7.4 + 0.5 * frailty, 1.8)), 1, 9)
    discharge = _choice(
        rng, {"1": 0.60, "3": 0.14, "6": 0.13, "2": 0.03, "22": 0.03, "5": 0.02, "18": 0.03, "11": 0.02}, count, mix[3]
    )
    insulin = _choice(rng, {"No": 0.47, "Steady": 0.30, "Down": 0.12, "Up": 0.11}, count)
    diagnosis = _choice(rng, _DIAGNOSES, count, 0.3 * mix[4])
    logit = (
        -2.85
        + 0.75 * np.log1p(inpatient)
        + 0.25 * np.log1p(emergency)
        + 0.20 * np.log(days)
        + 0.06 * (number_diagnoses - 7)
        + 0.10 * (age - 65) / 15
        + 0.45 * np.isin(discharge, ["3", "5", "2"])
        + 1.10 * (discharge == "22")
        + 0.20 * (discharge == "6")
        + 0.18 * np.isin(insulin, ["Down", "Up"])
        + 0.25 * (diagnosis == "428")
        + 0.35 * frailty
    )
    soon = rng.random(count) < 1 / (1 + np.exp(-logit))
    later = rng.random(count) < 0.38
    columns: dict[str, npt.NDArray[np.generic]] = {
        "encounter_id": np.arange(first_encounter, first_encounter + count),
        "patient_nbr": patients,
        "race": _choice(rng, {"Caucasian": 0.75, "AfricanAmerican": 0.19, "Hispanic": 0.02, "?": 0.04}, count, mix[5]),
        "gender": _choice(rng, {"Female": 0.54, "Male": 0.46}, count),
        "age": np.array(_AGES)[(age // 10).astype(int)],
        "weight": np.full(count, "?"),
        "admission_type_id": _choice(rng, {"1": 0.6, "2": 0.2, "3": 0.2}, count, mix[2]),
        "discharge_disposition_id": discharge,
        "admission_source_id": _choice(rng, {"7": 0.6, "1": 0.3, "4": 0.06, "6": 0.04}, count, mix[1]),
        "time_in_hospital": days.astype(int),
        "payer_code": _choice(
            rng, {"?": 0.4, "MC": 0.33, "HM": 0.07, "SP": 0.05, "BC": 0.1, "MD": 0.05}, count, mix[0]
        ),
        "medical_specialty": _choice(
            rng,
            {"?": 0.5, "InternalMedicine": 0.2, "Cardiology": 0.1, "Emergency/Trauma": 0.1, "Surgery-General": 0.1},
            count,
            mix[4],
        ),
        "num_lab_procedures": np.clip(np.round(rng.normal(43, 19, count)), 1, 100).astype(int),
        "num_procedures": np.minimum(rng.poisson(1.3, count), 6),
        "num_medications": np.clip(np.round(rng.normal(16 + days / 2, 7)), 1, 60).astype(int),
        "number_outpatient": outpatient,
        "number_emergency": emergency,
        "number_inpatient": inpatient,
        "diag_1": diagnosis,
        "diag_2": _choice(rng, _DIAGNOSES, count),
        "diag_3": _choice(rng, _DIAGNOSES, count),
        "number_diagnoses": number_diagnoses.astype(int),
        "max_glu_serum": _choice(rng, {"None": 0.94, "Norm": 0.03, ">200": 0.02, ">300": 0.01}, count),
        "A1Cresult": _choice(rng, {"None": 0.83, "Norm": 0.05, ">7": 0.04, ">8": 0.08}, count),
    }
    for drug in _DRUGS:
        columns[drug] = np.full(count, "No")
    columns["metformin"] = _choice(rng, {"No": 0.8, "Steady": 0.18, "Up": 0.01, "Down": 0.01}, count)
    columns["insulin"] = insulin
    medicated = (insulin != "No") | (columns["metformin"] != "No") | (rng.random(count) < 0.4)
    columns["change"] = np.where(medicated & (rng.random(count) < 0.6), "Ch", "No")
    columns["diabetesMed"] = np.where(medicated, "Yes", "No")
    columns["readmitted"] = np.where(soon, "<30", np.where(later, ">30", "NO"))
    return columns


def _choice(rng: np.random.Generator, weights: Mapping[str, float], count: int, tilt: float = 0.0) -> Strings:
    """Draw levels; `tilt` shifts weight from the first level to the last ones, which makes hospitals differ."""
    levels = list(weights)
    raw: Floats = np.array(list(weights.values())) * np.exp(0.35 * tilt * np.linspace(-1, 1, len(levels)))
    drawn: Strings = np.array(levels)[rng.choice(len(levels), count, p=raw / raw.sum())]
    return drawn
