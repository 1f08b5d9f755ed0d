import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.dataset import Dataset, SplitName
from services.hospital_node.sources.files import FileSource
from services.hospital_node.sources.mapping import PartitionFile, SourceMapping, load_mapping
from services.hospital_node.sources.reader import ROWS_WITH_BOTH_OUTCOMES, read_dataset
from tests.support.tiny_plan import PRIVATE, changed, manifest

PLAN = manifest(PRIVATE)
HEADER = "encounter,patient,outcome,left,age,visits,ward,urgent"
ROWS = (
    "e1,p1,yes,home,70,3,A,Yes",
    "e2,p1,no,home,30.5,?,428.5,No",
    "e3,p2,no,dead,banana,?,?,?",
    'e4,p3,no,,400,,"Z, other",Yes',
)


def csv_file(folder: Path, *rows: str, header: str = HEADER, name: str = "data.csv") -> Path:
    path = folder / name
    path.write_text("\n".join((header, *rows)) + "\n", encoding="utf-8")
    return path


def refused(path: Path, **arguments: Any) -> FedmeshError:
    with pytest.raises(FedmeshError) as caught:
        read_dataset(path, PLAN, **arguments)
    assert caught.value.code is Code.DATA_INVALID
    return caught.value


def check_tiny(data: Dataset) -> None:
    assert data.feature_names == ("age", "visits", "ward=heart", "ward=others", "urgent")
    expected = [
        [2.0, math.log1p(3), -0.5, 0.0, 0.5],
        [-1.95, 0.0, 1.5, 0.0, -0.5],
        [5.0, 0.0, -0.5, 1.0, 0.5],
    ]
    np.testing.assert_allclose(data.x, np.array(expected, dtype=np.float32))
    assert data.x.dtype == np.float32
    assert data.y.tolist() == [1.0, 0.0, 0.0]
    assert data.encounter_ids.tolist() == ["e1", "e2", "e4"]
    assert data.patient_ids.tolist() == ["p1", "p1", "p3"]
    assert (data.rows_read, data.rows_excluded, data.rows_elsewhere) == (4, 1, 0)
    assert data.split[0] == data.split[1]


def test_csv_and_parquet_give_the_same(tmp_path: Path) -> None:
    path = csv_file(tmp_path, *ROWS)
    check_tiny(read_dataset(path, PLAN))
    # The name says nothing about the content.
    parquet = tmp_path / "data.txt"
    duckdb.sql(f"COPY (SELECT * FROM read_csv('{path}', all_varchar = true)) TO '{parquet}' (FORMAT parquet)")
    check_tiny(read_dataset(parquet, PLAN))


def test_subgroups_are_read_beside_the_features(tmp_path: Path) -> None:
    subgroups = [{"column": "ward"}, {"column": "age", "bands": [30.5, 71]}, {"column": "urgent"}]
    document = {**PRIVATE, "features": ["visits"], "checks": {"subgroups": subgroups}}
    data = read_dataset(csv_file(tmp_path, *ROWS), manifest(document))
    assert data.x.shape == (3, 1)
    assert data.groups is not None
    # An age on an edge is in the upper band; a ward outside the levels is in `others`.
    assert data.groups.tolist() == [[0, 1, 1], [1, 1, 0], [2, 2, 1]]
    bare = csv_file(tmp_path, "e1,p1,yes,home,70,3,Yes", header=HEADER.replace("ward,", ""), name="bare.csv")
    with pytest.raises(FedmeshError, match="lacks 1 column: ward"):
        read_dataset(bare, manifest(document))


def test_typed_parquet_columns_read_like_text(tmp_path: Path) -> None:
    path = tmp_path / "typed.parquet"
    duckdb.sql(
        f"""COPY (SELECT 7 AS encounter, 12.0::DOUBLE AS patient, 'yes' AS outcome, NULL::VARCHAR AS "left",
        70::SMALLINT AS age, 3.0::FLOAT AS visits, 420.0::DECIMAL(9, 2) AS ward, 'No' AS urgent)
        TO '{path}' (FORMAT parquet)"""
    )
    data = read_dataset(path, PLAN)
    assert data.patient_ids.tolist() == ["12"]
    np.testing.assert_allclose(data.x, np.array([[2.0, math.log1p(3), 1.5, 0.0, -0.5]], dtype=np.float32))


def test_missing_columns_are_all_named(tmp_path: Path) -> None:
    error = refused(csv_file(tmp_path, "e1,p1", header="encounter,patient"))
    for name in ("outcome", "left", "age", "visits", "ward", "urgent"):
        assert name in error.message


@pytest.mark.parametrize(
    ("row", "column", "reason"),
    [
        ("e9,p9,no,home,secret,1,A,Yes", "age", "is not a number"),
        ("e9,p9,no,home,nan,1,A,Yes", "age", "is not a finite number"),
        ("e9,p9,no,home,-Infinity,1,A,Yes", "age", "is not a finite number"),
        ("e9,p9,no,home,1_0,1,A,Yes", "age", "is not a number"),
        ("e9,p9,no,home,,1,A,Yes", "age", "is missing"),
        ("e9,p9,maybe,home,1,1,A,Yes", "outcome", "none of the outcomes"),
        ("e9,p9,,home,1,1,A,Yes", "outcome", "none of the outcomes"),
        ("e9,p9,no,home,1,1,A,perhaps", "urgent", "none of the values"),
        ("e9,,no,home,1,1,A,Yes", "patient", "is missing"),
        ("?,p9,no,home,1,1,A,Yes", "encounter", "is missing"),
    ],
)
def test_wrong_cells_are_counted_and_placed_but_not_quoted(tmp_path: Path, row: str, column: str, reason: str) -> None:
    error = refused(csv_file(tmp_path, *ROWS, row))
    assert error.detail == {"column": column, "count": "1", "row": "5"}
    assert reason in error.message
    for value in ("secret", "maybe", "perhaps", "p9", "e9"):
        assert value not in error.message


@pytest.mark.parametrize("value", ["'NaN'::DOUBLE", "'Infinity'::FLOAT", "'-Infinity'::DOUBLE"])
def test_typed_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: str) -> None:
    path = tmp_path / "typed.parquet"
    duckdb.sql(
        f"""COPY (SELECT 7 AS encounter, 12 AS patient, 'yes' AS outcome, NULL::VARCHAR AS "left",
        {value} AS age, 3 AS visits, 420 AS ward, 'No' AS urgent) TO '{path}' (FORMAT parquet)"""
    )
    error = refused(path)
    assert error.detail == {"column": "age", "count": "1", "row": "1"}
    assert "is not a finite number" in error.message


@pytest.mark.parametrize(
    ("ward", "reason"), [("Z", "belongs to none of the levels: 'a', 'heart'"), ("?", "is missing")]
)
def test_a_category_outside_the_schema_is_refused_where_the_schema_says_so(
    tmp_path: Path, ward: str, reason: str
) -> None:
    strict = manifest(changed(PRIVATE, "feature_schema.columns.2.others", "refuse"))
    path = csv_file(tmp_path, "e1,p1,yes,home,70,3,A,Yes", f"e2,p2,no,home,30,1,{ward},Yes")
    with pytest.raises(FedmeshError) as caught:
        read_dataset(path, strict)
    assert caught.value.detail == {"column": "ward", "count": "1", "row": "2"}
    assert reason in caught.value.message


def test_all_wrong_cells_are_counted(tmp_path: Path) -> None:
    error = refused(csv_file(tmp_path, *(f"e{i},p{i},no,home,x{i % 2},1,A,Yes" for i in range(7))))
    assert error.detail == {"column": "age", "count": "7", "row": "1"}


def test_repeated_encounter_is_refused(tmp_path: Path) -> None:
    error = refused(csv_file(tmp_path, *ROWS, "e1,p7,no,home,1,1,A,Yes"))
    assert error.detail == {"column": "encounter", "count": "1", "row": "5"}


def truncated_parquet(folder: Path) -> bytes:
    path = folder / "whole.parquet"
    duckdb.sql(f"COPY (SELECT range AS encounter FROM range(1000)) TO '{path}' (FORMAT parquet)")
    return path.read_bytes()[:-100]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (lambda _: b"", "is empty"),
        (lambda _: b" \n\n", "is empty"),
        (lambda _: HEADER.encode() + b"\n", "no rows"),
        (lambda _: b"\x89PNG\r\n\x1a\n\0\0\0", "neither Parquet nor CSV"),
        (lambda _: b"PK\x03\x04" + bytes(50), "neither Parquet nor CSV"),
        (lambda _: b"PAR1 but no more", "damaged: it cannot be read as Parquet"),
        (truncated_parquet, "damaged: it cannot be read as Parquet"),
        (lambda _: (HEADER + "\ne1,p1,yes\n").encode(), "damaged at line 2"),
        (lambda _: (HEADER + "\n" + ROWS[0] + ",extra\n").encode(), "damaged at line 2"),
        (lambda _: (HEADER + '\ne1,p1,yes,home,70,3,"A,Yes\n').encode(), "damaged"),
        (lambda _: b"age,age\n1,2\n", "age twice"),
        (lambda _: b"hello world\n", "lacks 8 columns"),
        (lambda _: ("\n".join((HEADER, ROWS[2])) + "\n").encode(), "excluded"),
    ],
)
def test_bad_files(tmp_path: Path, content: Callable[[Path], bytes], reason: str) -> None:
    path = tmp_path / "data.parquet"
    path.write_bytes(content(tmp_path))
    message = refused(path).message
    assert re.search(reason, message)
    assert "p1" not in message
    assert str(tmp_path) not in message


def test_file_that_cannot_be_opened(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path / "nothing.csv").message
    assert "cannot read" in refused(tmp_path).message


def test_patterns_in_a_path_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "a*b"
    folder.mkdir()
    assert "not allowed" in refused(csv_file(folder, *ROWS)).message


def test_quotes_in_names_are_not_sql(tmp_path: Path) -> None:
    folder = tmp_path / "it's; DROP"
    folder.mkdir()
    header = HEADER.replace("ward", 'w"" x')
    path = csv_file(folder, *ROWS, header=header.replace('w"" x', '"w"" x\'"'))
    mapping = SourceMapping.model_validate_json(
        '{"format": "fedmesh.mapping/v1", "feature_schema": "tiny", "columns": {"ward": {"column": "w\\" x\'"}}}'
    )
    check_tiny(read_dataset(path, PLAN, mapping))


def test_nested_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "nested.parquet"
    columns = ", ".join(f'[1] AS "{name}"' for name in HEADER.split(","))
    duckdb.sql(f"COPY (SELECT {columns}) TO '{path}' (FORMAT parquet)")
    assert "age is INTEGER[]" in refused(path).message


def test_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = csv_file(tmp_path, *(f"e{i},p{i},no,home,1,1,A,Yes" for i in range(20_000)))
    stop = threading.Event()

    def keep_changing() -> None:
        with path.open("r+b") as stream:
            while not stop.is_set():
                for digit in (b"2", b"1"):
                    stream.seek(-8, os.SEEK_END)
                    stream.write(digit)
                    stream.flush()
                    # Longer than a digest takes, shorter than the whole reading.
                    stop.wait(0.003)

    writer = threading.Thread(target=keep_changing)
    writer.start()
    try:
        message = ""
        for _ in range(200):
            try:
                read_dataset(path, PLAN)
            except FedmeshError as error:
                # A reading that met no change says what else is wrong with such a file.
                message = error.message
            if "changed while" in message:
                break
    finally:
        stop.set()
        writer.join()
    assert "changed while it was read" in message


def test_mapping_of_names_and_values(tmp_path: Path) -> None:
    header = HEADER.replace("urgent", "Dringend").replace("age", "Alter")
    path = csv_file(tmp_path, *(row.replace("Yes", "ja") for row in ROWS), header=header)
    (tmp_path / "mapping.yaml").write_text(
        "format: fedmesh.mapping/v1\nfeature_schema: tiny\ncolumns:\n"
        "  urgent: {column: Dringend, values: {ja: Yes}}\n  age: {column: Alter}\n"
    )
    check_tiny(read_dataset(path, PLAN, load_mapping(tmp_path / "mapping.yaml")))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("format: fedmesh.mapping/v1\nfeature_schema: other\n", "for schema 'other'"),
        ("format: fedmesh.mapping/v1\nfeature_schema: tiny\ncolumns: {height: {column: h}}\n", "height"),
        ("format: fedmesh.mapping/v1\nfeature_schema: tiny\ntable: x\n", "unknown field table"),
        ("format: fedmesh.mapping/v9\nfeature_schema: tiny\n", "format"),
    ],
)
def test_bad_mappings(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mapping.yaml").write_text(text)
    with pytest.raises(FedmeshError, match=reason) as caught:
        read_dataset(csv_file(tmp_path, *ROWS), PLAN, load_mapping(tmp_path / "mapping.yaml"))
    assert caught.value.code is Code.CONFIG_INVALID


def test_partition_selects_and_splits(tmp_path: Path) -> None:
    path = csv_file(tmp_path, *ROWS)
    partition = csv_file(
        tmp_path, "p1,0,test", "p2,0,train", "p3,1,val", "p9,0,train", header="patient_nbr,hospital,split", name="p.csv"
    )
    data = read_dataset(path, PLAN, None, PartitionFile(partition, "0"))
    assert data.encounter_ids.tolist() == ["e1", "e2"]
    assert data.split.tolist() == [SplitName.TEST, SplitName.TEST]
    assert (data.rows_excluded, data.rows_elsewhere) == (1, 1)
    other = read_dataset(path, PLAN, None, PartitionFile(partition, "1"))
    assert other.split.tolist() == [SplitName.VALIDATION]
    assert "gives no patient" in refused(path, partition=PartitionFile(partition, "7")).message


@pytest.mark.parametrize(
    ("rows", "reason"),
    [(("p1,0,test", "p1,0,train"), "more than once"), (("p1,0,holdout",), "must be one of"), (("p1,0",), "damaged")],
)
def test_bad_partitions(tmp_path: Path, rows: tuple[str, ...], reason: str) -> None:
    partition = csv_file(tmp_path, *rows, header="patient_nbr,hospital,split", name="p.csv")
    assert reason in refused(csv_file(tmp_path, *ROWS), partition=PartitionFile(partition, "0")).message


def test_split_is_by_patient_and_near_the_fractions(tmp_path: Path) -> None:
    path = csv_file(tmp_path, *(f"e{i},p{i // 2},{'yes' if i % 9 == 0 else 'no'},home,1,1,A,Yes" for i in range(4000)))
    data = read_dataset(path, PLAN)
    assert (data.split[0::2] == data.split[1::2]).all()
    shares = [data.rows(side).patients / 2000 for side in SplitName]
    np.testing.assert_allclose(shares, [0.5, 0.25, 0.25], atol=0.05)
    for side in SplitName:
        rows = data.rows(side)
        assert sorted(set(rows.patient.tolist())) == list(range(rows.patients))
        assert rows.patients == len(set(rows.patient_ids.tolist()))
    salted = manifest(changed(PRIVATE, "feature_schema.split.salt", "other"))
    assert (read_dataset(path, salted).split != data.split).any()


def test_two_features_may_read_one_column(tmp_path: Path) -> None:
    document = changed(PRIVATE, "feature_schema.columns.3.column", "flagged")
    document["feature_schema"]["columns"].append(
        {"kind": "categorical", "name": "elderly", "column": "age", "levels": [{"name": "yes", "ranges": [[65, 200]]}]}
    )
    plan = manifest(changed(document, "features", ["age", "elderly"]))
    data = read_dataset(csv_file(tmp_path, *ROWS), plan)
    assert data.x[:, 1].tolist() == [1.0, 0.0, 0.0]


def test_files_are_read_as_one_and_errors_name_the_file(tmp_path: Path) -> None:
    first = csv_file(tmp_path, *ROWS, name="a.csv")
    second = csv_file(tmp_path, "e5,p5,yes,home,40,1,A,No", name="b.csv")
    data = read_dataset(FileSource((first, second)), PLAN)
    assert data.encounter_ids.tolist() == ["e1", "e2", "e4", "e5"]
    second = csv_file(tmp_path, "e5,p5,yes,home,40,1,A,No", "e6,p6,yes,home,old,1,A,No", name="b.csv")
    with pytest.raises(FedmeshError, match=r"data row 2 of b\.csv is not a number"):
        read_dataset(FileSource((first, second)), PLAN)
    second.write_text(HEADER + "\ne5,p5\n")
    with pytest.raises(FedmeshError, match=r"^b\.csv is damaged at line 2"):
        read_dataset(FileSource((first, second)), PLAN)


def test_a_patient_in_two_files_is_refused_unless_merged(tmp_path: Path) -> None:
    first = csv_file(tmp_path, *ROWS, name="a.csv")
    # Blanks around an id are no part of it.
    second = csv_file(tmp_path, "e5, p1 ,yes,home,40,1,A,No", name="b.csv")
    with pytest.raises(FedmeshError) as caught:
        read_dataset(FileSource((first, second)), PLAN)
    assert "1 patient id stands in more than one file" in caught.value.message
    assert "data row 1 of a.csv and data row 1 of b.csv" in caught.value.message
    data = read_dataset(FileSource((first, second)), PLAN, merge_patients=True)
    assert data.patient_ids.tolist() == ["p1", "p1", "p3", "p1"]
    assert data.patient[0] == data.patient[1] == data.patient[3]


def test_an_encounter_in_two_files_is_refused(tmp_path: Path) -> None:
    files = (csv_file(tmp_path, *ROWS, name="a.csv"), csv_file(tmp_path, ROWS[0], name="b.csv"))
    with pytest.raises(FedmeshError, match=r"earlier row; for example data row 1 of b\.csv"):
        read_dataset(FileSource(files), PLAN, merge_patients=True)


def test_an_outcome_that_never_varies_is_refused(tmp_path: Path) -> None:
    rows = [f"e{i},p{i},no,home,1,1,A,Yes" for i in range(ROWS_WITH_BOTH_OUTCOMES)]
    assert "the outcome is negative in every row" in refused(csv_file(tmp_path, *rows)).message
    # Of few rows it may be chance.
    assert len(read_dataset(csv_file(tmp_path, *rows[1:]), PLAN).y) == ROWS_WITH_BOTH_OUTCOMES - 1


def test_a_missing_column_is_told_with_the_one_that_may_be_meant(tmp_path: Path) -> None:
    error = refused(csv_file(tmp_path, *ROWS, header=HEADER.replace("visits", "Visits_").replace("age", "years")))
    assert "visits (is it 'Visits_'?" in error.message
    assert "age" in error.message
    assert "'years'" not in error.message


def test_further_problems_are_counted(tmp_path: Path) -> None:
    error = refused(csv_file(tmp_path, "e1,p1,maybe,home,old,1,A,perhaps"))
    assert "'age'" in error.message
    assert "2 more problems" in error.message


_ENDLESS = """
from services.hospital_node.sources.table import sandbox
try:
    with sandbox([]) as database:
        print("begun", flush=True)
        database.execute("SELECT sum(hash(range)) FROM range(1000000000000000)")
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_during_a_query_is_ctrl_c() -> None:
    with subprocess.Popen([sys.executable, "-c", _ENDLESS], stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "begun\n"
            child.send_signal(signal.SIGINT)
            assert child.stdout.readline() == "interrupted\n"
            assert child.wait(60) == 0
        finally:
            child.kill()
