"""Configuration of the hospital node, and the checks of it that need the files it names."""

from datetime import date
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from services.common.config import (
    Address,
    ClientConfig,
    Section,
    TelemetryConfig,
    TlsConfig,
    read_secret,
    require_private,
)
from services.common.credentials import CredentialFolder
from services.common.errors import Code, FedmeshError
from services.common.identity import Kind
from services.common.tls import load_tls
from services.plans.document import read_file
from services.privacy.approval import require_approved
from services.privacy.budget import Limit
from services.secure_sum.cohort import MAX_COLLUDERS
from services.secure_sum.roster import MemberKeys, Roster, load_roster_file
from services.transparency.checkpoint import VerifierKey, parse_verifier_key

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]

PublicKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class PartitionConfig(Section):
    file: Path = Field(description="CSV that says which patients of a public benchmark file play which hospital")
    hospital: str = Field(min_length=1, description="the value of the hospital column that means this hospital")
    patient_column: str = Field(
        default="patient_nbr", min_length=1, description="column of the CSV with the patient id"
    )
    hospital_column: str = Field(default="hospital", min_length=1, description="column of the CSV with the hospital")
    split_column: str = Field(default="split", min_length=1, description="column of the CSV with train, val or test")


class OmopConfig(Section):
    dsn_file: Path = Field(
        description="file of mode 0600 with the libpq connection string of a role that may only read, password included"
    )
    cdm_schema: str = Field(
        default="public", min_length=1, description="schema of the tables of the OMOP CDM, version 5.4"
    )
    vocabulary_schema: str | None = Field(
        default=None, min_length=1, description="schema of the table `concept`; absent: the same"
    )
    connect_timeout_s: int = Field(default=10, ge=1, le=300, description="seconds to wait for a connection")
    statement_timeout_s: int = Field(
        default=600, ge=1, le=86_400, description="seconds after which the database ends a statement"
    )


class FhirConfig(Section):
    folder: Path = Field(description="folder of a FHIR R4 bulk export: NDJSON files, plain or gzipped, named by type")


class DataConfig(Section):
    file: Path | None = Field(
        default=None, description="Parquet or CSV file with the encounters; it must not change while a job runs"
    )
    files: tuple[Path, ...] = Field(default=(), description="several such files in the place of one")
    patients_across_files: Literal["refuse", "merge"] = Field(
        default="refuse",
        description="what a patient id in several files means: a mistake, or (`merge`) the same person, whose records "
        "count as one patient's",
    )
    omop: OmopConfig | None = Field(
        default=None, description="a PostgreSQL in the layout of the OMOP CDM 5.4 in the place of a file"
    )
    fhir: FhirConfig | None = Field(default=None, description="a FHIR bulk export in the place of a file")
    sql: Path | None = Field(
        default=None,
        description="SQL that maps OMOP or FHIR tables to the schema's columns; absent: the mapping that ships",
    )
    until: date | None = Field(
        default=None,
        description="leave out of OMOP or FHIR data what happened after this day, so that a job sees one snapshot of a "
        "database that grows",
    )
    mapping: Path | None = Field(
        default=None,
        description="YAML that maps local columns to the public feature schema; absent: the names are the same",
    )
    partition: PartitionConfig | None = Field(
        default=None, description="for public benchmarks: take only some patients"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        named = [self.file is not None, bool(self.files), self.omop is not None, self.fhir is not None]
        if sum(named) != 1:
            raise ValueError("name exactly one of file, files, omop and fhir")
        if (self.sql or self.until) and self.tables:
            raise ValueError("sql and until are for omop and fhir")
        if len(set(self.tables)) != len(self.tables):
            raise ValueError("files names a file twice")
        return self

    @property
    def tables(self) -> tuple[Path, ...]:
        """The Parquet or CSV files; none with another source."""
        return self.files if self.file is None else (self.file,)


class PrivacyConfig(Section):
    epsilon_limit: float = Field(
        default=0.5,
        gt=0,
        le=100,
        description="most epsilon that the population may spend in any 365 days; above the default it needs `approval`",
    )
    delta_limit: float = Field(
        default=1e-5,
        gt=0,
        lt=1,
        description="most delta that the population may spend in any 365 days; above the default it needs `approval`",
    )
    max_plan_epsilon: float = Field(
        default=0.5, gt=0, le=100, description="refuse every plan that asks for more epsilon, whatever is left"
    )
    max_plan_delta: float = Field(default=1e-6, gt=0, lt=1, description="refuse every plan that asks for more delta")
    least_colluders: int | None = Field(
        default=None,
        ge=0,
        le=MAX_COLLUDERS,
        description="refuse every plan whose guarantee is against fewer colluding hospitals; absent: against as many as"
        " the roster tolerates",
    )
    approvers: dict[Name, PublicKey] = Field(
        default={}, description="who may approve a budget above the default: public keys by name, 64 hex digits"
    )
    approval: Path | None = Field(
        default=None, description="file of `fedmesh privacy approve` with the signatures of two approvers"
    )
    allow_without_privacy: bool = Field(
        default=False, description="take part in plans without differential privacy; for public or synthetic data only"
    )


class LimitsConfig(Section):
    max_rounds: int = Field(default=1000, ge=1, le=10_000, description="refuse plans with more rounds")
    max_vector_length: int = Field(
        default=1 << 24, ge=1, le=1 << 25, description="refuse plans whose contribution has more integers"
    )
    max_state_mb: int = Field(default=256, ge=1, le=1024, description="refuse model states larger than this, in MiB")
    max_jobs: int = Field(default=4, ge=1, le=64, description="most jobs whose data is kept in memory at once")
    call_timeout_s: float = Field(default=10.0, gt=0, le=300, description="deadline of one unary call in seconds")
    transfer_timeout_s: float = Field(
        default=120.0, gt=0, le=3600, description="deadline of one up- or download in seconds"
    )
    heartbeat_timeout_s: float = Field(
        default=20.0,
        gt=5,
        le=300,
        description="seconds of silence after which the task stream is opened anew (beats: 5 s)",
    )


class ChecksConfig(Section):
    segments: int = Field(
        default=1,
        ge=1,
        le=2048,
        description="randomly chosen segments of every sum that this hospital recomputes from the uploads",
    )


class WitnessConfig(Section):
    audit: ClientConfig = Field(description="the audit service")
    log_key: Path = Field(description="the audit log's public key in note format, brought out of band")
    interval_s: float = Field(
        default=30.0, gt=0, le=86_400, description="seconds between two looks at the audit log, at most"
    )
    spot_checks: int = Field(
        default=4,
        ge=0,
        le=1000,
        description="randomly chosen entries whose place in the log every look asks a proof for",
    )


class RenewalConfig(Section):
    folder: Path = Field(
        description="folder of `fedmesh hospital enrol`; `tls` must name the files in it, which the node replaces"
    )


class HospitalConfig(Section):
    hospital_id: Name = Field(description="this hospital's name; must equal the one in its certificate")
    tls: TlsConfig = Field(description="this hospital's certificate, used as a client")
    renewal: RenewalConfig | None = Field(
        default=None, description="how the node renews its certificate; absent: somebody else replaces the files"
    )
    registry: ClientConfig = Field(description="the registry: plans, jobs, model states")
    coordinator: ClientConfig = Field(description="the coordinator: tasks and reports")
    aggregator: ClientConfig = Field(description="the aggregator: ciphertexts and sums")
    data: DataConfig = Field(description="where the encounters are read from")
    population: Name = Field(
        description="name of the source population: the privacy budget belongs to it, whatever file it is read from"
    )
    data_dir: Path = Field(
        description="folder of this node alone, mode 0700: privacy ledger, round state, ciphertexts, model states"
    )
    member_keys: Path = Field(
        description="this hospital's signing and sealing keys, mode 0600, made by `fedmesh hospital keygen`"
    )
    roster: Path = Field(
        description="the founding roster, signed by every member and brought out of band; later ones follow from it"
    )
    privacy: PrivacyConfig = Field(default=PrivacyConfig(), description="what this hospital agrees to spend")
    plan_families: tuple[Name, ...] = Field(
        default=(),
        description="families of installed packages (entry points of fedmesh.plan_families) that plans may train by",
    )
    compile_cache: Path | None = Field(
        default=None,
        description="folder for compiled plans, may be shared by nodes of one user; absent: inside data_dir",
    )
    witness: WitnessConfig | None = Field(
        default=None, description="how this hospital witnesses the audit log; absent: it does not"
    )
    registry_key: Path | None = Field(
        default=None,
        description="the registry's public key in note format, brought out of band; `fedmesh models pull` needs it",
    )
    checks: ChecksConfig = Field(default=ChecksConfig(), description="how much of the centre's work is recomputed")
    limits: LimitsConfig = Field(default=LimitsConfig(), description="bounds on what a plan may cost this node")
    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="logs and traces")
    metrics_listen: Address | None = Field(default=None, description="host:port of the Prometheus metrics page")
    health_listen: Address | None = Field(
        default=None,
        description="host:port of a plaintext listener that serves grpc.health.v1 and nothing else, for probes",
    )


def check_config(config: HospitalConfig) -> None:
    """Check everything that can be known before the network is touched.

    Raises: FedmeshError(CONFIG_INVALID) for a certificate that is not this hospital's, keys that other users can read
        or that are another hospital's, a founding roster that is not in order, a budget above the default that two
        people did not approve, or missing data files.
    """
    identity = load_tls(config.tls).identity
    if identity.kind is not Kind.HOSPITAL or identity.name != config.hospital_id:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"hospital_id is {config.hospital_id}, but {config.tls.certificate} belongs to {identity}",
        )
    require_private(config.tls.key, "the private key")
    _require_own_files(config)
    _, roster = read_membership(config)
    if config.witness is not None:
        read_log_key(config.witness, roster.statement.consortium)
    privacy = config.privacy
    require_approved(
        Limit(privacy.epsilon_limit, privacy.delta_limit),
        config.hospital_id,
        config.population,
        privacy.approval,
        privacy.approvers,
    )
    check_data_files(config.data)


def check_data_files(data: DataConfig) -> None:
    """Whether what the section `data` names is there. Raises: FedmeshError(CONFIG_INVALID)."""
    named = [*data.tables, data.mapping, data.sql, None if data.partition is None else data.partition.file]
    for path in named:
        if path is not None and not path.is_file():
            raise FedmeshError(Code.CONFIG_INVALID, f"there is no file {path}")
    if data.fhir is not None and not data.fhir.folder.is_dir():
        raise FedmeshError(Code.CONFIG_INVALID, f"there is no folder {data.fhir.folder}")
    if data.omop is not None:
        read_secret(data.omop.dsn_file)


def _require_own_files(config: HospitalConfig) -> None:
    if config.renewal is None:
        return
    renewed = CredentialFolder(config.renewal.folder).tls
    named = {name: path.absolute() for name, path in config.tls}
    if named != dict(renewed):
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"renewal.folder is {config.renewal.folder}: then tls.ca is {renewed.ca}, tls.certificate is "
            f"{renewed.certificate} and tls.key is {renewed.key}",
        )


def read_membership(config: HospitalConfig) -> tuple[MemberKeys, Roster]:
    """This hospital's own keys and the founding roster.

    The roster need not list the hospital, nor these keys of it: it may have joined, or got other keys, by a later one.
    Nothing is spent before one is known that lists them (`usecases.spending`).

    Raises: FedmeshError(CONFIG_INVALID).
    """
    keys = MemberKeys.load(config.member_keys)
    if keys.hospital_id != config.hospital_id:
        raise FedmeshError(
            Code.CONFIG_INVALID,
            f"hospital_id is {config.hospital_id}, but the keys in {config.member_keys} are {keys.hospital_id}'s",
        )
    try:
        roster = load_roster_file(config.roster)
    except FedmeshError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{config.roster}: {error.message}") from error
    return keys, roster


def read_registry_key(config: HospitalConfig, consortium: str) -> VerifierKey:
    """The public key with which the registry signs statements about model versions.

    Raises: FedmeshError(CONFIG_INVALID) when none is named, or the file is missing, no key, or the key of another.
    """
    if config.registry_key is None:
        raise FedmeshError(
            Code.CONFIG_INVALID, "the configuration has no `registry_key`: whose statements are to count?"
        )
    return _read_key(config.registry_key, f"{consortium}/registry")


def read_log_key(config: WitnessConfig, consortium: str) -> VerifierKey:
    """The public key of the consortium's audit log.

    Raises: FedmeshError(CONFIG_INVALID) when the file is missing, no key, or the key of another log.
    """
    return _read_key(config.log_key, f"{consortium}/audit")


def _read_key(path: Path, expected: str) -> VerifierKey:
    try:
        key = parse_verifier_key(read_file(path, Code.CONFIG_INVALID).decode("utf-8", "replace").strip())
    except FedmeshError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path}: {error.message}") from error
    if key.name != expected:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} is the key of {key.name}, not of {expected}")
    return key
