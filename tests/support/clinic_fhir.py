"""A made-up clinic as a FHIR R4 bulk export."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support.clinic import VITAL, Clinic, Person, Visit

# All codes that mean the same to the mapping; which of them a visit has follows from its number.
_SYSTEMS = {
    "ICD-9": ("http://hl7.org/fhir/sid/icd-9-cm",),
    "ICD-10": (
        "http://hl7.org/fhir/sid/icd-10-cm",
        "http://hl7.org/fhir/sid/icd-10",
        "http://fhir.de/CodeSystem/bfarm/icd-10-gm",
    ),
}
_CLASSES = {
    "inpatient": ("IMP", "ACUTE", "NONAC"),
    "emergency": ("EMER",),
    "outpatient": ("AMB", "VR", "HH", "FLD"),
}
_FHIR = "http://terminology.hl7.org/CodeSystem/"
_UB04 = ("https://www.nubc.org/CodeSystem/PatDischargeStatus", "http://www.nubc.org/patient-discharge")
# What FHIR's own system calls it, if it has a word for it, and the codes of UB-04.
_DISCHARGES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "home": ("home", ("01", "81")),
    "hospital": ("other-hcf", ("02", "82")),
    "snf": ("snf", ("03", "83")),
    "intermediate": (None, ("04", "84")),
    "home-health": (None, ("06", "86")),
    "rehab": ("rehab", ("62", "90")),
    "long-term": ("long", ("63", "91")),
    "psych": ("psy", ("65", "93")),
    "hospice": ("hosp", ("51",)),
    "expired": ("exp", ("20",)),
}
_ADMITTED_FROM = {
    "hospital": ("hosp-trans",),
    "nursing": ("nursing",),
    "office": ("gp", "mp"),
    "clinic": ("outp",),
    "rehab": ("rehab", "psych"),
    "emergency": ("emd",),
}
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
    races |= {"hispanic": ("ethnicity", "2135-2"), "pacific": ("race", "2076-8"), "native": ("race", "1002-5")}
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
        "status": "in-progress" if visit.goes_on else "finished",
        "class": {"system": f"{_FHIR}v3-ActCode", "code": _one_of(_CLASSES[visit.kind], visit)},
        "subject": {"reference": f"Patient/{visit.person}"},
        "period": {"start": f"{visit.start}T08:00:00Z"} | ({} if visit.goes_on else {"end": f"{visit.end}T18:00:00Z"}),
        "diagnosis": [
            {"condition": {"reference": f"Condition/{visit.number}-{index}"}, "rank": index + 1}
            for index in range(min(1, len(visit.diagnoses)))
        ],
    }
    if visit.kind == "inpatient":
        # A hospital's own code stands first, as it often does.
        own = {"system": "https://ehr.example/discharge", "code": "20"}
        resource["hospitalization"] = {"dischargeDisposition": {"coding": [own, _discharge(visit)]}}
    if visit.from_emergency_room:
        resource["priority"] = _concept("v3-ActPriority", "EM")
        resource["hospitalization"]["admitSource"] = _concept("admit-source", "emd")
    elif visit.admitted_from:
        code = _one_of(_ADMITTED_FROM[visit.admitted_from], visit)
        resource["hospitalization"]["admitSource"] = _concept("admit-source", code)
    return resource


def _discharge(visit: Visit) -> dict[str, str]:
    named, numbered = _DISCHARGES[visit.discharge]
    if named is not None and visit.number % 3:
        return {"system": f"{_FHIR}discharge-disposition", "code": named}
    return {"system": _one_of(_UB04, visit), "code": _one_of(numbered, visit)}


def _concept(system: str, code: str) -> dict[str, Any]:
    return {"coding": [{"system": _FHIR + system, "code": code}]}


def _one_of(codes: tuple[str, ...], visit: Visit) -> str:
    # Divided first: which of them it is must not hang together with what else follows from the number.
    return codes[visit.number // 7 % len(codes)]


def _of(visit: Visit, resource_type: str, index: int, **elements: Any) -> dict[str, Any]:
    return {
        "resourceType": resource_type,
        "id": f"{visit.number}-{index}",
        "subject": {"reference": f"Patient/{visit.person}"},
        "encounter": {"reference": f"https://ehr.example/fhir/Encounter/{visit.number}/_history/2"},
        **elements,
    }


def _conditions(visit: Visit) -> Iterable[dict[str, Any]]:
    # The primary one, the first, is exported last: that it counts first follows from its rank alone.
    for index, (system, code) in (*enumerate(visit.diagnoses[1:], 1), *enumerate(visit.diagnoses[:1])):
        coding = [
            {"system": "http://snomed.info/sct", "code": "1"},
            {"system": _one_of(_SYSTEMS[system], visit), "code": code},
        ]
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
