"""`fedmesh hospital check-data`, as a hospital's data engineer uses it."""

import csv
import json
import random
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.cli.entry import main
from services.cli.small_counts import shown, shown_part, shown_parts, shown_text
from services.common.errors import FedmeshError
from services.hospital_node.sources.drift import stability, verdict
from services.hospital_node.sources.reader import read_dataset
from services.plans.manifest import canonical_bytes, plan_id
from services.plans.schema import bin_names
from tests.support.tiny_plan import PRIVATE, SCHEMA, changed, manifest

PLAN = manifest(PRIVATE)


@dataclass
class Hospital:
    """A hospital with a file and a plan; `check` runs the command."""

    folder: Path
    run: Callable[..., tuple[int, str]]

    def rows(self, count: int = 400, seed: int = 1) -> list[dict[str, str]]:
        draw = random.Random(seed)
        return [
            {
                "encounter": f"e{seed}-{row}",
                "patient": f"p{seed}-{row // 2}",
                "outcome": "yes" if draw.random() < 0.3 else "no",
                "left": "dead" if draw.random() < 0.1 else "home",
                "age": str(draw.randrange(20, 90)),
                "visits": str(draw.randrange(9)),
                "ward": draw.choice(["A", "415", "Z"]),
                "urgent": draw.choice(["Yes", "No"]),
            }
            for row in range(count)
        ]

    def write(self, rows: list[dict[str, str]], name: str = "data.csv") -> Path:
        path = self.folder / name
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return path

    def check(self, *options: str, plan: str = "plan.json", **data: Any) -> tuple[int, str]:
        somewhere = {"target": "127.0.0.1:1"}
        config = {
            "hospital_id": "hospital-01",
            "tls": {"ca": "ca.pem", "certificate": "tls.pem", "key": "tls.key"},
            **dict.fromkeys(("registry", "coordinator", "aggregator"), somewhere),
            "population": "ward",
            **dict.fromkeys(("data_dir", "member_keys", "roster"), "absent"),
            "data": data or {"file": str(self.folder / "data.csv")},
        }
        (self.folder / "hospital.yaml").write_text(yaml.safe_dump(config))
        return self.run("hospital", "check-data", "--config", "hospital.yaml", "--plan", plan, *options)


@pytest.fixture
def hospital(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Hospital:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "plan.json").write_bytes(canonical_bytes(PLAN))

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedmesh", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out + captured.err

    return Hospital(tmp_path, run)


def test_good_data_is_accepted_and_counted(hospital: Hospital) -> None:
    rows = hospital.rows()
    rows[0]["age"] = "120"
    data = read_dataset(hospital.write(rows), PLAN)
    code, shown_output = hospital.check("--exact", "--report", "report.json")
    assert code == 0
    assert "OK the plan accepts this data; nothing was sent" in shown_output
    report = json.loads((hospital.folder / "report.json").read_text())
    assert report["accepted"] is True
    assert report["cohort"]["rows in the cohort"] == str(len(data.y))
    assert report["cohort"]["positive outcomes"] == str(int(data.y.sum()))
    assert report["cohort"]["patients"] == str(len(set(data.patient_ids)))
    assert report["splits"]["train"]["rows"] == str(int((data.split == 0).sum()))
    features = {item["feature"]: item for item in report["features"]}
    assert features["age"]["out_of_range"] == "1"
    # Of no level: training puts it into the others.
    in_cohort = [row for row in rows if row["left"] != "dead"]
    assert features["ward"]["unknown"] == {"Z": str(sum(row["ward"] == "Z" for row in in_cohort))}


def test_every_problem_is_named_and_the_first_is_what_training_says(hospital: Hospital) -> None:
    rows = hospital.rows()
    rows = [row for row in rows if row["left"] != "dead"]
    rows[3]["age"], rows[4]["age"] = "NaN", "inf"
    for row in rows[:50:2]:
        row["urgent"] = "perhaps"
    rows[7]["urgent"] = "a name"
    rows[9]["encounter"] = rows[8]["encounter"]
    path = hospital.write(rows)
    code, output = hospital.check()
    assert code == 1
    assert "NO training would refuse this data" in output
    assert "column 'encounter': <11 rows repeat" in output
    assert "column 'age': <11 cells cannot be used" in output
    assert "column 'urgent': 26 cells cannot be used" in output
    assert "perhaps (25)" in output
    # A text of one row may be about one person.
    assert "a name" not in output
    assert "a name (1)" in hospital.check("--exact")[1]
    with pytest.raises(FedmeshError) as caught:
        read_dataset(path, PLAN)
    assert (
        caught.value.message.removesuffix(" (and 2 more problems: fedmesh hospital check-data names all)")
        in (hospital.check("--exact")[1])
    )


def test_missing_columns_and_one_class_are_refused(hospital: Hospital) -> None:
    hospital.write([{"Age" if name == "age" else name: text for name, text in row.items()} for row in hospital.rows()])
    code, output = hospital.check()
    assert code == 1
    assert "lacks 1 column: age (is it 'Age'?" in output
    hospital.write([{**row, "outcome": "no"} for row in hospital.rows()])
    code, output = hospital.check()
    assert code == 1
    assert "the outcome is negative in every row" in output


def test_patients_in_two_files(hospital: Hospital) -> None:
    first, second = hospital.rows(), hospital.rows(seed=2)
    for row in second[:24]:
        row["patient"] = "p1-3"
    files = [str(hospital.write(first, "a.csv")), str(hospital.write(second, "b.csv"))]
    code, output = hospital.check(files=files)
    assert code == 1
    assert "<11 patient ids stand in more than one file; for example in data row" in output
    assert hospital.check(files=files, patients_across_files="merge")[0] == 0


def test_drift_against_a_snapshot(hospital: Hospital) -> None:
    hospital.write(hospital.rows())
    assert hospital.check("--save", "before.json")[0] == 0
    assert stat.S_IMODE((hospital.folder / "before.json").stat().st_mode) == 0o600
    code, output = hospital.check("--against", "before.json")
    assert code == 0
    assert "0 of 5 distributions moved" in output
    hospital.write([{**row, "ward": "A" if row["ward"] == "Z" else row["ward"]} for row in hospital.rows()])
    code, output = hospital.check("--against", "before.json", "--report", "report.json")
    # Drift is told; it is the person's decision.
    assert code == 0
    assert "1 of 5 distributions moved (PSI 0.1 or more): ward" in output
    assert json.loads((hospital.folder / "report.json").read_text())["drift"]["psi"]["ward"] > 0.25
    (hospital.folder / "before.json").write_text("{}")
    code, output = hospital.check("--against", "before.json")
    assert code == 1
    assert "before.json is invalid" in output


def test_drift_against_the_reference_that_a_schema_declares(hospital: Hospital) -> None:
    reference = {"ward": {"a": 0.34, "heart": 0.33, "others": 0.33}, "outcome": {"positive": 0.9, "negative": 0.1}}
    plan = manifest(changed(PRIVATE, "feature_schema.reference", reference))
    (hospital.folder / "declared.json").write_bytes(canonical_bytes(plan))
    hospital.write(hospital.rows())
    code, output = hospital.check(plan="declared.json")
    assert code == 0
    assert "compared with the reference of schema 'tiny'" in output
    assert "1 of 2 distributions moved (PSI 0.1 or more): outcome" in output


def test_a_reference_must_be_in_the_schemas_bins() -> None:
    for reference, what in (
        ({"ward": {"nowhere": 1.0}}, "nowhere is no bin; there are: a, heart, others, missing"),
        ({"ward": {"a": 0.5}}, "add up to 0.5"),
        ({"weight": {"a": 1.0}}, "no column 'weight'"),
    ):
        with pytest.raises(FedmeshError, match=what):
            manifest(changed(PRIVATE, "feature_schema.reference", reference))


def test_a_schema_without_a_reference_leaves_no_trace_of_the_field() -> None:
    assert b'reference":{' not in canonical_bytes(PLAN)
    assert plan_id(PLAN) == plan_id(manifest({**PRIVATE, "feature_schema": {**SCHEMA, "reference": {}}}))


def test_bins_cover_a_column() -> None:
    columns = {column.name: column for column in PLAN.columns}
    assert bin_names(columns["age"])[:2] == ("0 to 10", "10 to 20")
    assert bin_names(columns["ward"]) == ("a", "heart", "others", "missing")


def test_the_population_stability_index() -> None:
    assert stability({"a": 50, "b": 50}, {"a": 0.5, "b": 0.5}) == 0
    # (0.6 - 0.5) ln(0.6 / 0.5) + (0.4 - 0.5) ln(0.4 / 0.5)
    assert stability({"a": 50, "b": 50}, {"a": 60, "b": 40}) == pytest.approx(0.0405465, abs=1e-6)
    assert stability({"a": 1}, {"a": 0}) is None
    assert [verdict(index) for index in (0.05, 0.1, 0.3)] == ["same", "moved", "shifted"]


def test_small_counts() -> None:
    assert [shown(count, False) for count in (0, 1, 10, 11, 1234)] == ["0", "<11", "<11", "11", "1,234"]
    assert shown(5, True) == "5"
    assert [shown_part(count, 100, False) for count in (100, 95, 89, 3)] == ["100", ">89", "89", "<11"]
    # With one withheld, the sum would tell it.
    assert shown_parts({"a": 5, "b": 50, "c": 100}, False) == {"a": "withheld", "b": "withheld", "c": "100"}
    assert shown_parts({"a": 0, "b": 50, "c": 100}, False) == {"a": "0", "b": "50", "c": "100"}
    assert shown_text("column 'x': 3 cells cannot be used; data row 5 of b.csv", False) == (
        "column 'x': <11 cells cannot be used; data row 5 of b.csv"
    )


def test_the_shipped_sql_can_be_printed(hospital: Hospital) -> None:
    code, output = hospital.run("hospital", "mapping", "fhir")
    assert code == 0
    assert "CREATE VIEW encounters" in output
    code, output = hospital.run("hospital", "mapping", "fhir", "heart")
    assert code == 1
    assert "name your own in data.sql" in output


def test_a_configuration_names_one_source(hospital: Hospital) -> None:
    code, output = hospital.check(file="a.csv", fhir={"folder": "x"})
    assert code == 1
    assert "name exactly one of file, files, omop and fhir" in output
    assert "there is no file a.csv" in hospital.check(file="a.csv")[1]
    assert "there is no folder x" in hospital.check(fhir={"folder": "x"})[1]
