"""Declarative descriptions of a local source: how its columns map to the schema, and benchmark partitions."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from services.common.errors import Code
from services.plans.document import Strict, parse_yaml, read_file, validate
from services.plans.schema import CellText, Identifier


class MappedColumn(Strict):
    """Where a schema column comes from: a local column, and what the local texts mean in the schema's vocabulary.

    Texts that `values` does not list stay as they are.
    """

    column: Annotated[str, Field(min_length=1, max_length=200)]
    values: dict[CellText, CellText] = Field(default_factory=dict)


class SourceMapping(Strict):
    """Local names for the schema's columns. A schema column that is not listed has the same name locally."""

    format: Literal["fedmesh.mapping/v1"]
    # The schema's name, so that a mapping is not used with another schema by mistake.
    feature_schema: Identifier
    columns: dict[Identifier, MappedColumn] = Field(default_factory=dict)


@dataclass(frozen=True)
class PartitionFile:
    """A benchmark's assignment of patients to hospitals and splits: a CSV with one row a patient.

    Public benchmarks come as one file without hospital ids; the partition says which patients play which hospital
    (`hospital`) and which of train, val, test they belong to. It takes the place of the schema's own split. Patients
    of the data file that the partition does not give to `hospital` are left out.
    """

    path: Path
    hospital: str
    patient_column: str = "patient_nbr"
    hospital_column: str = "hospital"
    split_column: str = "split"


def load_mapping(path: Path | str) -> SourceMapping:
    """Read a mapping from YAML.

    Raises: FedmeshError(CONFIG_INVALID) naming the field, its value and what is allowed.
    """
    path = Path(path)
    document = parse_yaml(read_file(path, Code.CONFIG_INVALID), path.name, Code.CONFIG_INVALID)
    return validate(SourceMapping, document, f"mapping {path.name}", Code.CONFIG_INVALID)
