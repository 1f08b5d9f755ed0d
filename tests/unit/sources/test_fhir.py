import gzip
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset
from services.hospital_node.sources.fhir import FhirSource
from services.hospital_node.sources.fhir_resources import reference
from services.hospital_node.sources.reader import read_dataset
from services.hospital_node.sources.staging import shipped_mapping
from services.plans.library import shipped_plan
from tests.support.clinic import made_up_clinic
from tests.support.clinic_fhir import write_fhir

PLAN = shipped_plan("readmission-logistic-private")
SQL = shipped_mapping("fhir", "readmission")


@pytest.fixture
def export(tmp_path: Path) -> Path:
    return write_fhir(tmp_path / "export", made_up_clinic(people=3))


def read(folder: Path, sql: str = SQL, until: date | None = None) -> Dataset:
    return read_dataset(FhirSource(folder, sql, "the mapping", until, folder.parent), PLAN)


def refused(folder: Path) -> str:
    with pytest.raises(FedmeshError) as caught:
        read(folder)
    assert caught.value.code is Code.DATA_INVALID
    return caught.value.message


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def cut_last_line(folder: Path) -> str:
    path = folder / "Patient.ndjson"
    path.write_text(path.read_text()[:-20])
    return f"Patient.ndjson line {len(lines(path))}: is cut off"


def cut_inside(folder: Path) -> str:
    path = folder / "Condition.ndjson"
    path.write_text("".join([lines(path)[0], '{"resourceType": "Condition", \n', *lines(path)[1:]]))
    return "Condition.ndjson line 2: is not JSON"


def other_type(folder: Path) -> str:
    (folder / "Patient.2.ndjson").write_text("\n" + lines(folder / "Condition.ndjson")[0])
    return "Patient.2.ndjson line 2: is Condition, but the file's name says Patient"


def not_an_object(folder: Path) -> str:
    (folder / "Patient.2.ndjson").write_text("[]\n")
    return "Patient.2.ndjson line 1: is no resource"


def no_id(folder: Path) -> str:
    (folder / "Patient.2.ndjson").write_text('{"resourceType": "Patient"}\n')
    return "Patient.2.ndjson line 1: has no id"


def id_twice(folder: Path) -> str:
    (folder / "Encounter.2.ndjson").write_text(lines(folder / "Encounter.001.ndjson")[1])
    return "Encounter.2.ndjson line 1: its id is that of an earlier Encounter (Encounter.001.ndjson line 2)"


def unknown_patient(folder: Path) -> str:
    path = folder / "Patient.ndjson"
    path.write_text("".join(lines(path)[1:]))
    return "Encounter.000.ndjson line 1: its patient is not in the export; 2 Encounters name such a patient"


def gzip_cut(folder: Path) -> str:
    path = folder / "Observation.ndjson.gz"
    path.write_bytes(path.read_bytes()[:-30])
    return "the gzip file is damaged or cut off here"


def gzip_damaged(folder: Path) -> str:
    path = folder / "Observation.ndjson.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))
    return "Observation.ndjson.gz line "


def wrong_shape(folder: Path) -> str:
    (folder / "Encounter.2.ndjson").write_text('{"resourceType": "Encounter", "id": "x", "period": "today"}\n')
    return "Encounter.2.ndjson line 1: its elements are not shaped as Encounter's in FHIR R4"


def type_missing(folder: Path) -> str:
    (folder / "MedicationRequest.ndjson").unlink()
    return "has no file of MedicationRequest"


@pytest.mark.parametrize(
    "damage",
    [
        cut_last_line,
        cut_inside,
        other_type,
        not_an_object,
        no_id,
        id_twice,
        unknown_patient,
        gzip_cut,
        gzip_damaged,
        wrong_shape,
        type_missing,
    ],
)
def test_broken_exports_are_refused_by_file_and_line(export: Path, damage: Callable[[Path], str]) -> None:
    expected = damage(export)
    assert expected in refused(export)


def test_what_fhir_allows_is_counted(export: Path, tmp_path: Path) -> None:
    before = read(export)
    subject = {"reference": "Patient/1001"}
    without_encounter = {"resourceType": "Observation", "id": "a", "subject": subject}
    elsewhere = {**without_encounter, "id": "b", "encounter": {"reference": "Encounter/unknown"}}
    text = "".join(json.dumps(item) + "\n" for item in (without_encounter, elsewhere))
    (export / "Observation.2.ndjson").write_bytes(gzip.compress(text.encode()))
    nobody = {"resourceType": "Encounter", "id": "c", "status": "finished", "class": {"code": "IMP"}}
    (export / "Encounter.2.ndjson").write_text(json.dumps({**nobody, "period": {"start": "2024-01-01"}}))
    database = duckdb.connect()
    loaded = FhirSource(export, SQL, "the mapping", None, tmp_path).load(database, ["patient_nbr", "encounter_id"])
    assert loaded.notes == (
        "1 other files in the folder were not read",
        "1 Encounters name no patient",
        "1 Observations name no Encounter",
        "1 Observations name an Encounter that is not exported",
    )
    assert read(export).encounter_ids.tolist() == before.encounter_ids.tolist()


def test_later_events_are_left_out(export: Path) -> None:
    everything, earlier = read(export), read(export, until=date(2024, 6, 30))
    assert 0 < len(earlier.y) < len(everything.y)
    # Nothing after that day has a say: the same as if the export had ended then.
    for path in export.glob("Encounter.*.ndjson"):
        kept = [text for text in lines(path) if json.loads(text)["period"]["start"] < "2024-07"]
        path.write_text("".join(kept))
    assert read(export, until=date(2024, 6, 30)).content_sha256 == earlier.content_sha256


def test_sql_of_the_hospital_takes_the_place_of_the_mapping(export: Path) -> None:
    changed = SQL.replace("WHEN i.gap <= 30 THEN '<30'", "WHEN i.gap <= 1 THEN '<30'")
    assert read(export, changed).y.sum() < read(export).y.sum()
    for sql, what in (("SELEC 1", "syntax error"), ("SELECT 1", "encounters"), ("SELECT * FROM nothing", "nothing")):
        with pytest.raises(FedmeshError, match=what) as caught:
            read(export, sql)
        assert caught.value.code is Code.CONFIG_INVALID


def test_sql_of_the_hospital_reaches_no_file(export: Path) -> None:
    with pytest.raises(FedmeshError, match="PermissionException"):
        read(export, "CREATE VIEW encounters AS SELECT * FROM read_csv('/etc/passwd')")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Patient/7", "7"),
        ("https://ehr.example/fhir/Patient/7", "7"),
        ("Patient/7/_history/3", "7"),
        ("urn:uuid:c0ffee", "c0ffee"),
        ("Group/7", None),
        ("", None),
    ],
)
def test_references(text: str, found: str | None) -> None:
    assert reference({"reference": text}, "Patient") == found


_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem/"
_UB04 = "https://www.nubc.org/CodeSystem/PatDischargeStatus"


def table(text: str) -> dict[str, str | None]:
    """`code=meaning` by code; a dash: the mapping makes nothing of it."""
    pairs = (pair.split("=") for pair in text.split())
    return {code: None if meaning == "-" else meaning for code, meaning in pairs}


# Numbers of UB-04 and what the schema's data set calls them; 18: not told apart.
UB04 = table(
    "01=1 02=2 03=3 04=4 05=5 06=6 07=7 08=8 09=9 20=11 21=18 30=12 40=19 41=20 42=21 43=27 50=13 51=14 61=15 62=22 "
    "63=23 64=24 65=28 66=29 69=18 70=30 "
    "81=1 82=2 83=3 84=4 85=5 86=6 87=18 88=27 89=15 90=22 91=23 92=24 93=28 94=29 95=30"
)
DISPOSITIONS = table(
    "home=1 alt-home=1 other-hcf=2 hosp=14 long=23 aadvice=7 exp=11 psy=28 rehab=22 snf=3 oth=18",
)
ADMIT_SOURCES = table("hosp-trans=4 emd=7 outp=2 born=- gp=1 mp=1 nursing=5 psych=6 rehab=6 other=-")
PRIORITIES = table("EM=1 UR=2 EL=3 R=-")
CLASSES = table(
    "IMP=inpatient ACUTE=inpatient NONAC=inpatient EMER=emergency AMB=outpatient VR=outpatient HH=outpatient "
    "FLD=outpatient OBSENC=- PRENC=- SS=-"
)


def visits(folder: Path, encounters: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the shipped mapping makes of Encounters, by their ids."""
    text = "".join(
        json.dumps({"resourceType": "Encounter", "status": "finished", "subject": {"reference": "Patient/1001"}} | item)
        + "\n"
        for item in encounters
    )
    (folder / "Encounter.codes.ndjson").write_text(text)
    database = duckdb.connect()
    FhirSource(folder, SQL, "the mapping", None, folder.parent).load(database, ["patient_nbr", "encounter_id"])
    found = database.execute("SELECT * FROM visits")
    names = [column[0] for column in found.description or ()]
    rows = [dict(zip(names, row, strict=True)) for row in found.fetchall()]
    wanted = {item["id"] for item in encounters}
    return {row["visit"]: row for row in rows if row["visit"] in wanted}


def concept(system: str | None, code: str) -> dict[str, Any]:
    return {"coding": [{"code": code} | ({} if system is None else {"system": system})]}


def test_every_code_of_the_value_sets_is_mapped(export: Path) -> None:
    expected: dict[str, tuple[str, str | None]] = {}
    encounters: list[dict[str, Any]] = []

    def add(column: str, meant: str | None, **elements: Any) -> None:
        identifier = f"code-{len(encounters)}"
        expected[identifier] = (column, meant)
        encounters.append({"id": identifier, "class": {"code": "IMP"}, **elements})

    for number, meant in UB04.items():
        for system in (_UB04, "http://www.nubc.org/patient-discharge", "urn:oid:2.16.840.1.113883.6.301.5", None):
            add("discharge", meant, hospitalization={"dischargeDisposition": concept(system, number)})
    for code, meant in DISPOSITIONS.items():
        stay = {"dischargeDisposition": concept(f"{_TERMINOLOGY}discharge-disposition", code)}
        add("discharge", meant, hospitalization=stay)
    for code, source in ADMIT_SOURCES.items():
        add("admission_source", source, hospitalization={"admitSource": concept(f"{_TERMINOLOGY}admit-source", code)})
    for code, kind in PRIORITIES.items():
        add("admission_type", kind, priority=concept(f"{_TERMINOLOGY}v3-ActPriority", code))
    for code, kind in CLASSES.items():
        add("kind", kind, **{"class": {"system": f"{_TERMINOLOGY}v3-ActCode", "code": code}})
    found = visits(export, encounters)
    assert {name: (column, found[name][column]) for name, (column, _) in expected.items()} == expected


def test_a_hospitals_own_code_is_not_taken_for_a_public_one(export: Path) -> None:
    """Whatever it says: "20" of UB-04 means that the patient died."""
    own = {"system": "https://ehr.example/discharge", "code": "20"}
    public = {"system": f"{_TERMINOLOGY}discharge-disposition", "code": "snf"}
    cases = {
        "both": ([own, public], "3"),
        "alone": ([own], "18"),
        "without": ([{"code": "20"}], "11"),
        "none": ([], "1"),
    }
    encounters = [
        {"id": name, "class": {"code": "IMP"}, "hospitalization": {"dischargeDisposition": {"coding": codings}}}
        for name, (codings, _) in cases.items()
    ]
    found = visits(export, encounters)
    assert {name: found[name]["discharge"] for name in cases} == {name: meant for name, (_, meant) in cases.items()}


@pytest.mark.parametrize("status", ["planned", "arrived", "triaged", "cancelled", "entered-in-error"])
def test_encounters_that_did_not_happen_are_left_out(export: Path, status: str) -> None:
    assert visits(export, [{"id": "x", "class": {"code": "IMP"}, "status": status}]) == {}


def test_dates_that_cannot_be_are_left_out_and_counted(export: Path) -> None:
    """A year mistyped by a century would make every recent stay look as if its patient had been followed up."""
    before = read(export)
    inpatient = {"resourceType": "Encounter", "status": "finished", "class": {"code": "IMP"}}
    impossible = [
        {"id": "back", "period": {"start": "2024-03-09", "end": "2024-03-02"}},
        {"id": "late", "period": {"start": "2124-03-01", "end": "2124-03-09"}},
    ]
    text = "".join(
        json.dumps({**inpatient, "subject": {"reference": "Patient/1001"}, **item}) + "\n" for item in impossible
    )
    (export / "Encounter.2.ndjson").write_text(text)
    database = duckdb.connect()
    source = FhirSource(export, SQL, "the mapping", None, export.parent)
    notes = source.load(database, ["patient_nbr", "encounter_id"]).notes
    assert {
        "1 Encounters end before they begin",
        "1 Encounters begin after the last day that counts (data.until, or today)",
    } <= set(notes)
    after = read(export)
    assert after.encounter_ids.tolist() == before.encounter_ids.tolist()
    np.testing.assert_array_equal(after.y, before.y)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_does_not_have_are_refused(export: Path, value: str) -> None:
    path = export / "Observation.2.ndjson"
    text = json.dumps({"resourceType": "Observation", "id": "n", "valueQuantity": {"value": "here"}})
    path.write_text(text.replace('"here"', value) + "\n")
    assert "Observation.2.ndjson line 1: is not JSON" in refused(export)


def test_a_value_that_is_not_finite_is_no_laboratory_result(export: Path) -> None:
    """1e999 is JSON, and infinity as soon as it is read."""
    stay = visits(
        export, [{"id": "s", "class": {"code": "IMP"}, "period": {"start": "2024-01-01", "end": "2024-01-03"}}]
    )
    assert stay["s"]["kind"] == "inpatient"
    for code, unit in (("4548-4", "%"), ("2345-7", "mg/dL")):
        observation = {
            "resourceType": "Observation",
            "id": code,
            "subject": {"reference": "Patient/1001"},
            "encounter": {"reference": "Encounter/s"},
            "category": [{"coding": [{"code": "laboratory"}]}],
            "code": {"coding": [{"system": "http://loinc.org", "code": code}]},
            "valueQuantity": {"value": 0, "code": unit},
        }
        text = json.dumps(observation).replace('"value": 0', '"value": 1e999')
        (export / f"Observation.{code}.ndjson").write_text(text + "\n")
    database = duckdb.connect()
    FhirSource(export, SQL, "the mapping", None, export.parent).load(database, ["patient_nbr", "encounter_id"])
    found = database.execute("SELECT \"A1Cresult\", max_glu_serum, num_lab_procedures FROM encounters "
                             "WHERE encounter_id = 's'").fetchall()  # fmt: skip
    assert found == [(None, None, 2)]
