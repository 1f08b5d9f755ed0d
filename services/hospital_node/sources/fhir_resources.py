"""FHIR R4 resources as flat rows: the elements that the mapping reads, as texts."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from services.hospital_node.sources.ndjson import Line
from services.hospital_node.sources.staging import Row, StagedTable

# Where the row came from; every table has them as its last columns.
_PLACE: Final = {"file": "INTEGER", "line": "BIGINT"}

PATIENT: Final = StagedTable(
    "fhir_patient",
    {
        "id": "VARCHAR",
        "gender": "VARCHAR",
        "birth_date": "VARCHAR",
        "race": "VARCHAR",
        "ethnicity": "VARCHAR",
        "deceased_date": "VARCHAR",
        **_PLACE,
    },
)
ENCOUNTER: Final = StagedTable(
    "fhir_encounter",
    {
        "id": "VARCHAR",
        "patient": "VARCHAR",
        "status": "VARCHAR",
        "class": "VARCHAR",
        "start_time": "VARCHAR",
        "end_time": "VARCHAR",
        "priority": "VARCHAR",
        "admit_source": "VARCHAR",
        "discharge": "VARCHAR",
        **_PLACE,
    },
)
DIAGNOSIS: Final = StagedTable(
    "fhir_diagnosis", {"encounter": "VARCHAR", "condition": "VARCHAR", "rank": "INTEGER", **_PLACE}
)
CONDITION: Final = StagedTable(
    "fhir_condition",
    {
        "id": "VARCHAR",
        "patient": "VARCHAR",
        "encounter": "VARCHAR",
        "verification": "VARCHAR",
        "system": "VARCHAR",
        "code": "VARCHAR",
        "position": "BIGINT",
        **_PLACE,
    },
)
MEDICATION_REQUEST: Final = StagedTable(
    "fhir_medication_request",
    {
        "id": "VARCHAR",
        "patient": "VARCHAR",
        "encounter": "VARCHAR",
        "status": "VARCHAR",
        "intent": "VARCHAR",
        "code": "VARCHAR",
        "name": "VARCHAR",
        "dose": "DOUBLE",
        "position": "BIGINT",
        **_PLACE,
    },
)
OBSERVATION: Final = StagedTable(
    "fhir_observation",
    {
        "id": "VARCHAR",
        "patient": "VARCHAR",
        "encounter": "VARCHAR",
        "status": "VARCHAR",
        "laboratory": "BOOLEAN",
        "loinc": "VARCHAR",
        "value": "DOUBLE",
        "unit": "VARCHAR",
        **_PLACE,
    },
)
PROCEDURE: Final = StagedTable(
    "fhir_procedure",
    {"id": "VARCHAR", "patient": "VARCHAR", "encounter": "VARCHAR", "status": "VARCHAR", **_PLACE},
    optional=True,
)
# Resource type -> its table. FHIR's own type names.
TABLES: Final = {
    "Patient": PATIENT,
    "Encounter": ENCOUNTER,
    "Condition": CONDITION,
    "MedicationRequest": MEDICATION_REQUEST,
    "Observation": OBSERVATION,
    "Procedure": PROCEDURE,
}
_LOINC: Final = "http://loinc.org"
_ICD: Final = (
    ("http://hl7.org/fhir/sid/icd-9-cm", "ICD-9"),
    ("http://hl7.org/fhir/sid/icd-10-cm", "ICD-10"),
    ("http://hl7.org/fhir/sid/icd-10", "ICD-10"),
    ("http://fhir.de/CodeSystem/bfarm/icd-10-gm", "ICD-10"),
)
_PRIORITY: Final = ("http://terminology.hl7.org/CodeSystem/v3-ActPriority",)
_ADMIT_SOURCE: Final = ("http://terminology.hl7.org/CodeSystem/admit-source",)
# The patient discharge status of UB-04 has had several names; FHIR's own system is read beside it.
_DISCHARGE: Final = (
    "https://www.nubc.org/CodeSystem/PatDischargeStatus",
    "http://www.nubc.org/patient-discharge",
    "urn:oid:2.16.840.1.113883.6.301.5",
    "http://terminology.hl7.org/CodeSystem/discharge-disposition",
)
_US_CORE: Final = "http://hl7.org/fhir/us/core/StructureDefinition/us-core-"


def row_of(line: Line, position: int) -> Row:
    """The resource's row in its table, without its place. `position` numbers the resources of its type.

    Raises: FedmeshError(DATA_INVALID) naming file and line when an element has another shape than FHIR's.
    """
    resource = line.resource
    flatten = _FLATTENERS[resource["resourceType"]]
    try:
        return flatten(resource, position)
    except (AttributeError, TypeError, KeyError, IndexError, ValueError):
        raise line.refuse(f"its elements are not shaped as {resource['resourceType']}'s in FHIR R4") from None


def diagnosis_rows(line: Line) -> Iterator[Row]:
    """Encounter.diagnosis: one row for each condition referred to. Raises: as `row_of`."""
    try:
        for item in line.resource.get("diagnosis") or []:
            rank = item.get("rank")
            yield (
                line.resource["id"],
                reference(item.get("condition"), "Condition"),
                None if rank is None else int(rank),
            )
    except (AttributeError, TypeError, ValueError):
        raise line.refuse("its elements are not shaped as Encounter's in FHIR R4") from None


def reference(element: dict[str, Any] | None, target: str) -> str | None:
    """The id that a Reference names, relative, absolute or with a version; None when it names none of that type."""
    text = None if element is None else element.get("reference")
    if not text:
        return None
    parts = str(text).split("/_history/")[0].split("/")
    if len(parts) >= 2:
        return parts[-1] if parts[-2] == target else None
    return str(text).removeprefix("urn:uuid:")


def _patient(resource: dict[str, Any], _position: int) -> Row:
    deceased = resource.get("deceasedDateTime")
    return (
        resource["id"],
        resource.get("gender"),
        resource.get("birthDate"),
        _omb_category(resource, "race"),
        _omb_category(resource, "ethnicity"),
        # A month or a year is no day; that the patient died then is lost.
        deceased if deceased is not None and len(deceased) >= len("2000-01-01") else None,
    )


def _omb_category(resource: dict[str, Any], name: str) -> str | None:
    for extension in resource.get("extension") or []:
        if extension.get("url") == _US_CORE + name:
            for part in extension.get("extension") or []:
                if part.get("url") == "ombCategory":
                    return _text(part["valueCoding"].get("code"))
    return None


def _encounter(resource: dict[str, Any], _position: int) -> Row:
    period = resource.get("period") or {}
    stay = resource.get("hospitalization") or {}
    return (
        resource["id"],
        reference(resource.get("subject"), "Patient"),
        resource.get("status"),
        (resource.get("class") or {}).get("code"),
        period.get("start"),
        period.get("end"),
        _code_of(resource.get("priority"), _PRIORITY),
        _code_of(stay.get("admitSource"), _ADMIT_SOURCE),
        _code_of(stay.get("dischargeDisposition"), _DISCHARGE),
    )


def _condition(resource: dict[str, Any], position: int) -> Row:
    codings = (resource.get("code") or {}).get("coding") or []
    system, code = None, None
    for url, name in _ICD:
        found = next((coding.get("code") for coding in codings if coding.get("system") == url), None)
        if found:
            system, code = name, found
            break
    if code is None and codings:
        code = codings[0].get("code")
    return (
        resource["id"],
        reference(resource.get("subject"), "Patient"),
        reference(resource.get("encounter"), "Encounter"),
        _code(resource.get("verificationStatus")),
        system,
        code,
        position,
    )


def _medication_request(resource: dict[str, Any], position: int) -> Row:
    concept = resource.get("medicationCodeableConcept") or _contained_medication(resource) or {}
    coding = (concept.get("coding") or [{}])[0]
    return (
        resource["id"],
        reference(resource.get("subject"), "Patient"),
        reference(resource.get("encounter"), "Encounter"),
        resource.get("status"),
        resource.get("intent"),
        coding.get("code"),
        coding.get("display") or concept.get("text"),
        _dose(resource),
        position,
    )


def _contained_medication(resource: dict[str, Any]) -> dict[str, Any] | None:
    wanted = (resource.get("medicationReference") or {}).get("reference", "")
    for contained in resource.get("contained") or []:
        if wanted == f"#{contained.get('id')}":
            code: dict[str, Any] | None = contained.get("code")
            return code
    return None


def _dose(resource: dict[str, Any]) -> float | None:
    for instruction in resource.get("dosageInstruction") or []:
        for rate in instruction.get("doseAndRate") or []:
            value = (rate.get("doseQuantity") or {}).get("value")
            if value is not None:
                return float(value)
    return None


def _observation(resource: dict[str, Any], _position: int) -> Row:
    categories = [coding.get("code") for item in resource.get("category") or [] for coding in item.get("coding") or []]
    codings = (resource.get("code") or {}).get("coding") or []
    quantity = resource.get("valueQuantity") or {}
    value = quantity.get("value")
    return (
        resource["id"],
        reference(resource.get("subject"), "Patient"),
        reference(resource.get("encounter"), "Encounter"),
        resource.get("status"),
        "true" if "laboratory" in categories else "false",
        next((coding.get("code") for coding in codings if coding.get("system") == _LOINC), None),
        None if value is None else float(value),
        quantity.get("code"),
    )


def _procedure(resource: dict[str, Any], _position: int) -> Row:
    return (
        resource["id"],
        reference(resource.get("subject"), "Patient"),
        reference(resource.get("encounter"), "Encounter"),
        resource.get("status"),
    )


def _code(concept: dict[str, Any] | None) -> str | None:
    """The first code of a CodeableConcept."""
    return _text(((concept or {}).get("coding") or [{}])[0].get("code"))


def _code_of(concept: dict[str, Any] | None, systems: tuple[str, ...]) -> str | None:
    """The code of one of these systems, else one that names none, else "SYSTEM|CODE", which no mapping knows.

    A hospital's own "20" must not be taken for the "20" of a public system, which may mean that the patient died.
    """
    codings = [coding for coding in (concept or {}).get("coding") or [] if coding.get("code") is not None]
    for system in systems:
        for coding in codings:
            if coding.get("system") == system:
                return _text(coding["code"])
    unnamed = next((coding for coding in codings if not coding.get("system")), None)
    if unnamed is not None:
        return _text(unnamed["code"])
    return f"{codings[0]['system']}|{codings[0]['code']}" if codings else None


def _text(value: object) -> str | None:
    return None if value is None else str(value)


_FLATTENERS: Final[dict[str, Callable[[dict[str, Any], int], Row]]] = {
    "Patient": _patient,
    "Encounter": _encounter,
    "Condition": _condition,
    "MedicationRequest": _medication_request,
    "Observation": _observation,
    "Procedure": _procedure,
}
