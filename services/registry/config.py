"""Settings of the registry."""

from pathlib import Path

from pydantic import Field

from services.common.config import ClientConfig, PostgresConfig, Section, ServerConfig, TelemetryConfig
from services.common.grpc.strangers import StrangersConfig
from services.common.standing import StandingConfig
from services.privacy.budget import DEFAULT_LIMIT


class BlobConfig(Section):
    max_bytes: int = Field(
        default=256 * 1024 * 1024,
        ge=1024,
        le=1024 * 1024 * 1024,
        description="largest blob that a hospital may store, in bytes",
    )
    max_uploads: int = Field(
        default=16, ge=1, le=1000, description="uploads received at once; more are told to come again"
    )
    idle_s: float = Field(
        default=30.0, gt=0, le=3600, description="seconds that an upload may stand still before it is dropped"
    )
    memory_bytes: int = Field(
        default=2 * 1024 * 1024, ge=0, description="bytes of one upload held in memory; the rest waits in spool_dir"
    )
    spool_dir: Path | None = Field(
        default=None,
        description="folder for uploads that are not complete yet; null means the system's temporary folder",
    )


class RelayConfig(Section):
    interval_s: float = Field(
        default=1.0, gt=0, le=60, description="seconds between looks at the outbox when nothing wakes it"
    )
    batch: int = Field(default=200, ge=1, le=500, description="most events sent to the audit log in one call")
    timeout_s: float = Field(default=10.0, gt=0, le=60, description="deadline of one call to the audit log, in seconds")
    claim_s: float = Field(
        default=30.0, ge=1, le=600, description="seconds after which another replica may send claimed events"
    )
    max_backoff_s: float = Field(
        default=10.0, gt=0, le=300, description="longest wait between tries while the audit log is away, in seconds"
    )


class EpochConfig(Section):
    max_age_h: float = Field(
        default=24.0, gt=0, le=24 * 31, description="hours after which the hospitals make new keys; daily at least"
    )


class EnrolmentConfig(StrangersConfig):
    ca_certificate: Path = Field(
        description="PEM file with the issuing authority, then those between it and a root of `server.tls.ca`"
    )
    ca_key: Path = Field(description="PEM file (mode 0600) with the issuing authority's key; both may be replaced")
    lifetime_s: float = Field(
        default=7 * 86400.0, ge=10, le=90 * 86400, description="seconds for which a hospital's certificate is valid"
    )
    backdate_s: float = Field(
        default=300.0,
        ge=0,
        le=3600,
        description="seconds in the past at which certificates begin, for clocks that are behind",
    )


class StrikeConfig(Section):
    limit: int = Field(default=5, ge=1, le=1000, description="strikes that suspend a hospital")
    window_s: float = Field(default=3600.0, gt=0, le=86400 * 31, description="seconds within which strikes count")


class BudgetConfig(Section):
    epsilon_limit: float = Field(
        default=DEFAULT_LIMIT.epsilon,
        gt=0,
        le=100,
        description="epsilon that hospitals let a population spend in 365 days: from it the metrics say what is left",
    )
    delta_limit: float = Field(default=DEFAULT_LIMIT.delta, gt=0, lt=1, description="the same of delta")


class RegistryConfig(Section):
    server: ServerConfig = Field(description="where the registry listens, and its certificate, also used towards audit")
    postgres: PostgresConfig = Field(description="the database, as role registry_service")
    audit: ClientConfig = Field(description="the audit service that the outbox is relayed to")
    signing_key: Path | None = Field(
        default=None,
        description="Ed25519 key in note format, for statements about model versions; without it nothing is promoted",
    )
    telemetry: TelemetryConfig = Field(default_factory=TelemetryConfig, description="logs and traces")
    blobs: BlobConfig = Field(default_factory=BlobConfig, description="limits of uploads")
    relay: RelayConfig = Field(
        default_factory=RelayConfig, description="how events travel from the outbox to the audit log"
    )
    budget: BudgetConfig = Field(
        default_factory=BudgetConfig, description="the hospitals' privacy budget, as far as the metrics show it"
    )
    epochs: EpochConfig = Field(default_factory=EpochConfig, description="key epochs of the secure sum")
    enrolment: EnrolmentConfig | None = Field(
        default=None, description="how hospitals get certificates from the registry; null: from elsewhere"
    )
    standing: StandingConfig = Field(
        default_factory=StandingConfig, description="how revoked certificates come to be known"
    )
    strikes: StrikeConfig = Field(
        default_factory=StrikeConfig, description="when a hospital that sends what no honest node sends is suspended"
    )
