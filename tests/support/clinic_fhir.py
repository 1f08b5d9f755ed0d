"""A made-up clinic as a FHIR R4 bulk export."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support.clinic import VITAL, Clinic, Person, Visit

_SYSTEMS = {"ICD-9": "http://hl7.org/fhir/sid/icd-9-cm", "ICD-10": "http://hl7.org/fhir/sid/icd-10-cm"}
_CLASSES = {"inpatient": "IMP", "emergency": "EMER", "outpatient": "AMB"}
_DISCHARGES = {"home": "home", "hospital": "other-hcf", "snf": "snf", "rehab": "rehab", "psych": "psy"}
_DISCHARGES |= {"hospice": "hosp", "expired": "exp"}
_US_CORE = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"


def write_fhir(folder: Path, clinic: Clinic) -> Path:
    """Files as a bulk export has them: two of Encounter, Observation gzipped."""
    folder.mkdir()
    encounters = [_encounter(visit) for visit in clinic.visits]
    half = len(encounters) // 2
    _write(folder / "Patient.ndjson", map(_patient, clinic.people))
    _write(folder / "Encounter.000.ndjson", encounters[:half])
    _write(folder / "Encounter.001.ndjson", encounters[half:])
    _write(folder / "Condition.ndjson", (item for visit in clinic.visits for item in _conditions(visit)))
    _write(folder / "MedicationRequest.ndjson", (item for visit in clinic.visits for item in _requests(visit)))
    _write(folder / "Procedure.ndjson", (item for visit in clinic.visits for item in _procedures(visit)))
    observations = "".join(json.dumps(item) + "\n" for visit in clinic.visits for item in _observations(visit))
    (folder / "Observation.ndjson.gz").write_bytes(gzip.compress(observations.encode()))
    (folder / "AllergyIntolerance.ndjson").write_text("not read\n")
    return folder


def _write(path: Path, resources: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(resource) + "\n" for resource in resources), encoding="utf-8")


def _patient(person: Person) -> dict[str, Any]:
    races = {"white": ("race", "2106-3"), "black": ("race", "2054-5"), "asian": ("race", "2028-9")}
    races["hispanic"] = ("ethnicity", "2135-2")
    resource: dict[str, Any] = {
        "resourceType": "Patient",
        "id": str(person.number),
        "gender": person.sex,
        "birthDate": person.birth.isoformat(),
    }
    if person.race in races:
        name, code = races[person.race]
        part = {"url": "ombCategory", "valueCoding": {"code": code}}
        resource["extension"] = [{"url": _US_CORE + name, "extension": [part]}]
    if person.death:
        resource["deceasedDateTime"] = f"{person.death}T23:00:00+01:00"
    return resource


def _encounter(visit: Visit) -> dict[str, Any]:
    resource: dict[str, Any] = {
        "resourceType": "Encounter",
        "id": str(visit.number),
        "status": "finished",
        "class": {"code": _CLASSES[visit.kind]},
        "subject": {"reference": f"Patient/{visit.person}"},
        "period": {"start": f"{visit.start}T08:00:00Z", "end": f"{visit.end}T18:00:00Z"},
        "diagnosis": [
            {"condition": {"reference": f"Condition/{visit.number}-{index}"}, "rank": index + 1}
            for index in range(min(1, len(visit.diagnoses)))
        ],
    }
    if visit.kind == "inpatient":
        coding = {"coding": [{"code": _DISCHARGES[visit.discharge]}]}
        resource["hospitalization"] = {"dischargeDisposition": coding}
    if visit.from_emergency_room:
        resource["priority"] = {"coding": [{"code": "EM"}]}
        resource["hospitalization"]["admitSource"] = {"coding": [{"code": "emd"}]}
    return resource


def _of(visit: Visit, resource_type: str, index: int, **elements: Any) -> dict[str, Any]:
    return {
        "resourceType": resource_type,
        "id": f"{visit.number}-{index}",
        "subject": {"reference": f"Patient/{visit.person}"},
        "encounter": {"reference": f"https://ehr.example/fhir/Encounter/{visit.number}/_history/2"},
        **elements,
    }


def _conditions(visit: Visit) -> Iterable[dict[str, Any]]:
    for index, (system, code) in enumerate(visit.diagnoses):
        coding = [{"system": "http://snomed.info/sct", "code": "1"}, {"system": _SYSTEMS[system], "code": code}]
        yield _of(visit, "Condition", index, code={"coding": coding})


def _requests(visit: Visit) -> Iterable[dict[str, Any]]:
    for index, drug in enumerate(visit.drugs):
        yield _of(
            visit,
            "MedicationRequest",
            index,
            status="completed",
            intent="order",
            medicationCodeableConcept={"coding": [{"code": f"rx-{drug.name}", "display": drug.name}]},
            dosageInstruction=[{"doseAndRate": [{"doseQuantity": {"value": drug.dose}}]}],
        )


def _observations(visit: Visit) -> Iterable[dict[str, Any]]:
    for index, lab in enumerate(visit.labs):
        category = "vital-signs" if lab.loinc == VITAL[0] else "laboratory"
        yield _of(
            visit,
            "Observation",
            index,
            status="final",
            category=[{"coding": [{"code": category}]}],
            code={"coding": [{"system": "http://loinc.org", "code": lab.loinc}]},
            valueQuantity={"value": lab.value, "code": lab.unit},
        )


def _procedures(visit: Visit) -> Iterable[dict[str, Any]]:
    for index in range(visit.procedures):
        yield _of(visit, "Procedure", index, status="completed")
