"""Where the data comes from: the OpenML form by a server on the loopback, marks, folders that refuse."""

import hashlib
import http.server
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import numpy as np
import pytest
from rich.console import Console

from services.common.errors import Code, FedmeshError
from services.demo import datasets, openml
from services.demo.run import DemoOptions, prepare_data, run_demo
from services.demo.synthetic import generate
from services.hospital_node.sources.mapping import PartitionFile
from services.hospital_node.sources.reader import read_dataset
from services.plans.library import shipped_plan

PLAN = shipped_plan("readmission-logistic-private")
NUMERIC = ("encounter_id", "patient_nbr", "discharge_disposition_id", "admission_type_id", "number_inpatient")


@dataclass
class OpenML:
    """Answers as OpenML does: a description, and the ARFF file under the id that it names."""

    arff: bytes = b""
    status: int = 200
    sent: int | None = None
    asked: list[str] = field(default_factory=list)
    address: str = ""

    def answer(self, path: str) -> bytes:
        if path == "/api/v1/json/data/4541":
            described = {"id": "4541", "name": "Diabetes130US", "format": "ARFF", "file_id": "1233"}
            md5 = hashlib.md5(self.arff, usedforsecurity=False).hexdigest()
            return json.dumps({"data_set_description": {**described, "md5_checksum": md5}}).encode()
        assert path == "/data/v1/download/1233"
        return self.arff[: self.sent]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[OpenML]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = OpenML()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            self.send_response(state.status)
            self.end_headers()
            self.wfile.write(state.answer(self.path))

        def log_message(self, *_arguments: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        state.address = f"http://127.0.0.1:{listening.server_address[1]}"
        thread = threading.Thread(target=listening.serve_forever, args=(0.02,))
        thread.start()
        yield state
        listening.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for `--data`: cells are texts."""
    folder = tmp_path_factory.mktemp("given")
    generate(folder, (80, 60, 40, 40))
    return folder


def arff(given: Path) -> bytes:
    """The folder's encounters as OpenML has them: numbers with a fraction, texts in quotes, gaps as a bare `?`."""
    with duckdb.connect() as connection:
        rows = connection.execute(f"from '{given}/diabetic_data.parquet' order by encounter_id").fetchall()
        names = [column[0] for column in connection.description or []]
    lines = ["% a comment", "@RELATION Diabetes130US", ""]
    for name in names:
        levels = "{" + ",".join(f"'{value}'" for value in ("?", "x,y")) + "}"
        lines.append(f"@ATTRIBUTE {name} {'NUMERIC' if name in NUMERIC else levels}")
    lines += ["", "@DATA"]
    for row in rows:
        cells = []
        for name, cell in zip(names, row, strict=True):
            quoted = "?" if cell == "?" else f"'{cell}'" if name in ("age", "readmitted") else cell
            cells.append(f"{cell}.0" if name in NUMERIC else quoted)
        lines.append(", ".join(cells) if "9" in row[0] else ",".join(cells))
    return ("\n".join(lines) + "\n").encode()


def fetched(server: OpenML, folder: Path) -> datasets.DemoData:
    return datasets.fetch_openml(folder, PLAN, lambda _text: None, server.address)


def test_openml_gives_the_rows_and_levels_of_the_given_form(server: OpenML, given: Path, tmp_path: Path) -> None:
    server.arff = arff(given)
    data = fetched(server, tmp_path / "data")
    assert (data.name, data.synthetic, set(data.hospitals) <= {str(number) for number in range(15)}) == (
        "diabetes130",
        False,
        True,
    )
    with duckdb.connect() as connection:
        ours = connection.execute(f"from '{data.encounters}' order by encounter_id").fetchall()
        assert ours == connection.execute(f"from '{given}/diabetic_data.parquet' order by encounter_id").fetchall()
    partition = PartitionFile(path=given / "partition15.csv", hospital="0")
    one = read_dataset(data.encounters, PLAN, partition=partition)
    other = read_dataset(given / "diabetic_data.parquet", PLAN, partition=partition)
    assert one.rows_excluded == other.rows_excluded > 0
    assert sorted(one.encounter_ids) == sorted(other.encounter_ids)
    np.testing.assert_array_equal(one.x[np.argsort(one.encounter_ids)], other.x[np.argsort(other.encounter_ids)])
    asked = len(server.asked)
    assert fetched(server, tmp_path / "data") == data
    assert len(server.asked) == asked, "what was fetched is used again"
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == [
        "diabetic_data.parquet",
        "partition15.csv",
        "source.txt",
    ]


def test_arff_values() -> None:
    lines = [
        "@attribute 'a b' REAL",
        '@attribute "c" {x}',
        "@attribute d string",
        "@data",
        r"11.0, 'it\'s, so' , 11.0",
        '1.50,"q",?',
        "2.278392e8,,?",
        "?,x,007",
    ]
    assert openml.read_arff(lines) == {
        "a b": ["11", "1.50", "227839200", "?"],
        "c": ["it's, so", "q", "", "x"],
        "d": ["11.0", "?", "?", "007"],
    }


def test_no_answer_is_explained(tmp_path: Path, server: OpenML) -> None:
    server.address = "http://127.0.0.1:1"
    with pytest.raises(FedmeshError, match=r"no internet access. Use --data DIR") as caught:
        fetched(server, tmp_path)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_a_status_is_named(tmp_path: Path, server: OpenML) -> None:
    server.status = 503
    with pytest.raises(FedmeshError, match="HTTP status 503: try again later") as caught:
        fetched(server, tmp_path)
    assert caught.value.code is Code.SERVICE_UNAVAILABLE


def test_half_a_file_is_not_taken(tmp_path: Path, server: OpenML, given: Path) -> None:
    server.arff = arff(given)
    server.sent = len(server.arff) // 2
    with pytest.raises(FedmeshError, match="not the whole file: try again"):
        fetched(server, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["source.txt"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<html></html>", "declares no attribute"),
        (b"@attribute a numeric\n@data\n1,2\n", "line 3 of OpenML's file has 2 values, expected 1"),
        (b"@attribute a numeric\n@data\n1\n", "lacks encounter_id, patient_nbr, readmitted"),
        (
            b"@attribute encounter_id numeric\n@attribute patient_nbr numeric\n@attribute readmitted {NO}\n"
            b"@data\n1,2,NO\n",
            "lacks .* columns: .*discharge_disposition_id",
        ),
    ],
)
def test_another_file_is_not_called_a_missing_network(
    tmp_path: Path, server: OpenML, content: bytes, expected: str
) -> None:
    server.arff = content
    with pytest.raises(FedmeshError, match=expected) as caught:
        fetched(server, tmp_path)
    assert caught.value.code is Code.DATA_INVALID


def test_what_a_demonstration_made_is_named_as_what_it_is(tmp_path: Path, given: Path) -> None:
    made = prepare_data(DemoOptions(tmp_path, hospitals=4), PLAN, lambda _text: None)
    assert made.encounters.parent == tmp_path / "data" / "synthetic"
    again = datasets.from_folder(made.encounters.parent, PLAN)
    assert again == made
    assert again.description == "SYNTHETIC cohort (nobody in it exists)"
    assert not datasets.from_folder(given, PLAN).synthetic, "without a mark it is the real data"
    (made.encounters.parent / "source.txt").write_text("mnist\n")
    with pytest.raises(FedmeshError, match="must say synthetic or diabetes130"):
        datasets.from_folder(made.encounters.parent, PLAN)


def test_fetched_data_lies_apart_from_the_synthetic(
    tmp_path: Path, server: OpenML, given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_data(DemoOptions(tmp_path, hospitals=4), PLAN, lambda _text: None)
    server.arff = arff(given)
    monkeypatch.setattr(datasets.fetch_openml, "__defaults__", (server.address,))
    data = prepare_data(DemoOptions(tmp_path, dataset="diabetes130"), PLAN, lambda _text: None)
    assert (data.name, data.encounters.parent) == ("diabetes130", tmp_path / "data" / "diabetes130")
    assert datasets.from_folder(data.encounters.parent, PLAN) == data


def test_without_a_network_the_last_demonstration_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.fetch_openml, "__defaults__", ("http://127.0.0.1:1",))
    kept = tmp_path / "stack" / "ca" / "ca.pem"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    with pytest.raises(FedmeshError, match="no answer from OpenML"):
        run_demo(DemoOptions(tmp_path, dataset="diabetes130"), Console(quiet=True))
    assert kept.exists()


@pytest.mark.parametrize("dataset", ["synthetic", "diabetes130"])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, dataset: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FedmeshError, match=r"cannot use the data folder .*Not a directory; choose") as caught:
        run_demo(DemoOptions(tmp_path / "file" / "demo", dataset=dataset), Console(quiet=True))
    assert caught.value.code is Code.CONFIG_INVALID


@pytest.mark.parametrize("name", ["source.txt", "diabetic_data.parquet", "partition15.csv"])
def test_a_full_disk_is_named(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "data" / "synthetic"
    folder.mkdir(parents=True)
    os.symlink("/dev/full", folder / f".{name}.part")
    with pytest.raises(FedmeshError, match=f"no space left for {folder}: free some") as caught:
        run_demo(DemoOptions(tmp_path, hospitals=4), Console(quiet=True))
    assert caught.value.code is Code.STORE_FULL
    assert not (folder / name).exists()


def test_a_full_disk_is_named_for_a_download(tmp_path: Path, server: OpenML, given: Path) -> None:
    server.arff = arff(given)
    os.symlink("/dev/full", tmp_path / ".openml.arff")
    with pytest.raises(FedmeshError, match="no space left") as caught:
        fetched(server, tmp_path)
    assert caught.value.code is Code.STORE_FULL
