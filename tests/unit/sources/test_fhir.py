import gzip
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import duckdb
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
