"""Settings of the audit service."""

from pathlib import Path

from pydantic import Field

from services.common.config import ClientConfig, PostgresConfig, Section, ServerConfig, TelemetryConfig
from services.common.standing import StandingConfig


class BatchConfig(Section):
    max_events: int = Field(
        default=1000,
        ge=1,
        le=10_000,
        description="events written in one transaction; a larger request still goes as a whole",
    )
    max_queued_events: int = Field(
        default=20_000,
        ge=500,
        description="events that may wait for their turn; beyond, callers are told to come again",
    )


class WitnessConfig(Section):
    period_s: float = Field(
        default=60.0,
        gt=0,
        le=86_400,
        description="seconds for which one checkpoint is offered to the witnesses; longer than the interval at which"
        " they look, so that all cosign the same one",
    )


class AuditConfig(Section):
    server: ServerConfig = Field(description="where the audit service listens, and its certificate")
    postgres: PostgresConfig = Field(description="the database, as role audit_service")
    registry: ClientConfig = Field(description="the registry, which says what hospitals may not call")
    standing: StandingConfig = Field(default=StandingConfig(), description="how suspended hospitals come to be known")
    signing_key: Path = Field(
        description="file (mode 0600) with the log's Ed25519 key in C2SP note format; its name is <consortium>/audit"
    )
    batch: BatchConfig = Field(default=BatchConfig(), description="how appends are gathered into transactions")
    witness: WitnessConfig = Field(default=WitnessConfig(), description="what witnesses are asked to cosign")
    telemetry: TelemetryConfig = Field(default=TelemetryConfig(), description="logs and traces")
