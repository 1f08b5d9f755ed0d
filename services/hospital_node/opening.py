"""From the configuration's section `data` to the source that it names. Imports no training."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.config import read_secret
from services.common.errors import Code
from services.hospital_node.config import DataConfig
from services.hospital_node.sources.cohort import Source
from services.hospital_node.sources.fhir import FhirSource
from services.hospital_node.sources.files import FileSource
from services.hospital_node.sources.mapping import PartitionFile, SourceMapping, load_mapping
from services.hospital_node.sources.omop import OmopSource
from services.hospital_node.sources.staging import shipped_mapping
from services.plans.document import read_file
from services.plans.manifest import PlanManifest


@contextmanager
def opened_source(data: DataConfig, manifest: PlanManifest) -> Iterator[Source]:
    """The configured source, with a folder of its own for what does not fit into memory while it is read.

    Raises: FedmeshError(CONFIG_INVALID): no SQL for the plan's schema, or a secret that cannot be read.
    """
    with tempfile.TemporaryDirectory(prefix="fedmesh-data-") as scratch:
        yield _source(data, manifest.feature_schema.name, Path(scratch))


def mapping_of(data: DataConfig) -> SourceMapping | None:
    """The configured renaming of columns. Raises: FedmeshError(CONFIG_INVALID)."""
    return None if data.mapping is None else load_mapping(data.mapping)


def partition_of(data: DataConfig) -> PartitionFile | None:
    """The configured partition of a public benchmark."""
    named = data.partition
    if named is None:
        return None
    return PartitionFile(named.file, named.hospital, named.patient_column, named.hospital_column, named.split_column)


def _source(data: DataConfig, schema: str, scratch: Path) -> Source:
    if data.omop is not None:
        return OmopSource(
            dsn=read_secret(data.omop.dsn_file),
            schema=data.omop.cdm_schema,
            vocabulary_schema=data.omop.vocabulary_schema or data.omop.cdm_schema,
            mapping=_sql(data, "omop", schema),
            mapping_name=_sql_name(data, "omop"),
            until=data.until,
            scratch=scratch,
            connect_timeout_s=data.omop.connect_timeout_s,
            statement_timeout_s=data.omop.statement_timeout_s,
        )
    if data.fhir is not None:
        return FhirSource(
            folder=data.fhir.folder,
            mapping=_sql(data, "fhir", schema),
            mapping_name=_sql_name(data, "fhir"),
            until=data.until,
            scratch=scratch,
        )
    return FileSource(data.tables)


def _sql(data: DataConfig, source: str, schema: str) -> str:
    if data.sql is None:
        return shipped_mapping(source, schema)
    return read_file(data.sql, Code.CONFIG_INVALID).decode("utf-8", "replace")


def _sql_name(data: DataConfig, source: str) -> str:
    return f"fedmesh's {source} mapping" if data.sql is None else f"data.sql ({data.sql.name})"
