"""A FHIR R4 bulk export (NDJSON files in a folder) as a source."""

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Final

import duckdb

from services.common.errors import Code, FedmeshError
from services.hospital_node.sources.cohort import Loaded, rows_sha256
from services.hospital_node.sources.fhir_resources import DIAGNOSIS, TABLES, diagnosis_rows, row_of
from services.hospital_node.sources.ndjson import read_lines
from services.hospital_node.sources.staging import (
    Row,
    StagedTable,
    create_table,
    insert_rows,
    mapping_errors,
    notes_of,
    run_mapping,
    set_extract,
)

_NAME: Final = re.compile(r"\.ndjson(\.gz)?$")
_REQUIRED: Final = tuple(name for name, table in TABLES.items() if not table.optional)
# Not attributable to a stay: FHIR allows it, so they are left out and counted.
_OUTSIDE: Final = "encounter NOT IN (SELECT id FROM fhir_encounter)"
_UNUSED_CONDITION: Final = (
    "encounter IS NULL AND id NOT IN (SELECT condition FROM fhir_diagnosis WHERE condition IS NOT NULL)"
)
_LATER: Final = "left(start_time, 10) > (SELECT CAST(until AS VARCHAR) FROM extract)"
_NOTES: Final = (
    ("fhir_encounter", "patient IS NULL", "Encounters name no patient"),
    ("fhir_encounter", "left(end_time, 10) < left(start_time, 10)", "Encounters end before they begin"),
    ("fhir_encounter", _LATER, "Encounters begin after the last day that counts (data.until, or today)"),
    ("fhir_condition", _UNUSED_CONDITION, "Conditions belong to no Encounter"),
    ("fhir_medication_request", "encounter IS NULL", "MedicationRequests name no Encounter"),
    ("fhir_medication_request", "name IS NULL AND code IS NULL", "MedicationRequests name no medication"),
    ("fhir_observation", "encounter IS NULL", "Observations name no Encounter"),
    ("fhir_condition", _OUTSIDE, "Conditions name an Encounter that is not exported"),
    ("fhir_medication_request", _OUTSIDE, "MedicationRequests name an Encounter that is not exported"),
    ("fhir_observation", _OUTSIDE, "Observations name an Encounter that is not exported"),
    (
        "fhir_diagnosis",
        "condition IS NULL OR condition NOT IN (SELECT id FROM fhir_condition)",
        "diagnoses of Encounters refer to a Condition that is not exported",
    ),
)


@dataclass(frozen=True)
class FhirSource:
    """Files `<...>Type<...>.ndjson` or `.ndjson.gz` in `folder`; their names say the resource type, as bulk exports do.

    `mapping` is SQL, called `mapping_name` in messages. With `until`, what happened later is left out.
    """

    folder: Path
    mapping: str
    mapping_name: str
    until: date | None
    scratch: Path | None

    @property
    def name(self) -> str:
        return f"the FHIR export in {self.folder.name}"

    @property
    def files(self) -> tuple[Path, ...]:
        return ()

    def load(self, database: duckdb.DuckDBPyConnection, needed: list[str]) -> Loaded:
        """See `Source.load`.

        Raises: FedmeshError: DATA_INVALID naming file and line for a broken line, a wrong resource type, an id twice,
            an Encounter of a patient that is not there; naming the type for which there is no file. CONFIG_INVALID for
            wrong SQL.
        """
        files, others = self._files()
        for table in (*TABLES.values(), DIAGNOSIS):
            create_table(database, table)
        numbered = [path for paths in files.values() for path in paths]
        for resource_type, paths in files.items():
            places = [(numbered.index(path), path) for path in paths]
            insert_rows(database, TABLES[resource_type], _rows(resource_type, places))
            _require_distinct(database, TABLES[resource_type], resource_type, numbered)
        places = [(numbered.index(path), path) for path in files["Encounter"]]
        insert_rows(database, DIAGNOSIS, _diagnoses(places))
        _require_patients(database, numbered)
        set_extract(database, self.until, bool(files["Procedure"]))
        notes = [f"{others} other files in the folder were not read"] if others else []
        notes += notes_of(database, _NOTES)
        loaded = run_mapping(database, self.mapping, self.mapping_name, needed, self.name)
        return replace(loaded, notes=tuple(notes))

    def reading(self) -> AbstractContextManager[None]:
        """See `Source.reading`."""
        return mapping_errors(self.mapping_name)

    def digest(self, database: duckdb.DuckDBPyConnection) -> str:
        """SHA-256 of the mapped rows: how the export is cut into files means nothing."""
        return rows_sha256(database)

    def _files(self) -> tuple[dict[str, list[Path]], int]:
        """Resource type -> its files in the order of their names; and how many other files there are."""
        files: dict[str, list[Path]] = {name: [] for name in TABLES}
        others = 0
        try:
            found = sorted(path for path in self.folder.iterdir() if path.is_file())
        except OSError as error:
            raise FedmeshError(Code.DATA_INVALID, f"cannot read the folder {self.folder}: {error.strerror}") from error
        for path in found:
            named = [part for part in re.split(r"[^A-Za-z]+", path.name) if part in TABLES]
            if _NAME.search(path.name) and named:
                files[named[0]].append(path)
            else:
                others += 1
        missing = [name for name in _REQUIRED if not files[name]]
        if missing:
            raise FedmeshError(
                Code.DATA_INVALID,
                f"the folder {self.folder} has no file of {', '.join(missing)}: files are told apart by their names, "
                "such as Patient.ndjson or Patient.000.ndjson.gz; export an empty file where there are none",
            )
        return files, others


def _rows(resource_type: str, places: list[tuple[int, Path]]) -> Iterator[Row]:
    position = 0
    for number, path in places:
        for line in read_lines(path, resource_type):
            position += 1
            yield *row_of(line, position), number, line.number


def _diagnoses(places: list[tuple[int, Path]]) -> Iterator[Row]:
    for number, path in places:
        for line in read_lines(path, "Encounter"):
            for row in diagnosis_rows(line):
                yield *row, number, line.number


def _require_distinct(
    database: duckdb.DuckDBPyConnection, table: StagedTable, resource_type: str, files: list[Path]
) -> None:
    repeats = database.execute(
        "SELECT file, line, first_file, first_line, count(*) OVER () FROM ("  # noqa: S608 - a table name of this module
        "SELECT file, line, row_number() OVER w AS number, first(file) OVER w AS first_file, "
        f"first(line) OVER w AS first_line FROM {table.name} WINDOW w AS (PARTITION BY id ORDER BY file, line)) "
        "WHERE number > 1 ORDER BY file, line LIMIT 1"
    ).fetchone()
    if repeats:
        file, line, first_file, first_line, count = repeats
        raise FedmeshError(
            Code.DATA_INVALID,
            f"{files[file].name} line {line}: its id is that of an earlier {resource_type} ({files[first_file].name} "
            f"line {first_line}); {count} line{'s repeat' if count > 1 else ' repeats'} an id. Is the folder one "
            "export, downloaded once?",
            file=files[file].name,
            line=line,
        )


def _require_patients(database: duckdb.DuckDBPyConnection, files: list[Path]) -> None:
    """Encounters of unknown patients: what is left would be a cohort that nobody chose."""
    broken = database.execute(
        "SELECT file, line, count(*) OVER () FROM fhir_encounter "
        "WHERE patient IS NOT NULL AND patient NOT IN (SELECT id FROM fhir_patient) ORDER BY file, line LIMIT 1"
    ).fetchone()
    if broken:
        file, line, count = broken
        raise FedmeshError(
            Code.DATA_INVALID,
            f"{files[file].name} line {line}: its patient is not in the export; {count} "
            f"Encounter{'s name' if count > 1 else ' names'} such a patient. Export Patient for the same group",
            file=files[file].name,
            line=line,
        )
