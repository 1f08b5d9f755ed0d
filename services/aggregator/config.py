"""Settings of the aggregator."""

from pydantic import Field

from services.common.config import ClientConfig, RedisConfig, Section, ServerConfig, TelemetryConfig
from services.common.standing import StandingConfig


class UploadConfig(Section):
    max_concurrent: int = Field(64, ge=1, le=1000, description="uploads received at once; more are told to come again")
    idle_s: float = Field(
        30.0, gt=0, le=3600, description="seconds that an upload may stand still before it is dropped"
    )


class AddingConfig(Section):
    workers: int = Field(1, ge=1, le=64, description="disposable processes that parse and add ciphertexts")
    timeout_s: float = Field(
        30.0, gt=0, le=600, description="seconds after which a worker that does not answer is killed"
    )
    batch: int = Field(16, ge=1, le=64, description="most uploads added to one sum in one step")


class AggregatorConfig(Section):
    server: ServerConfig = Field(description="where the aggregator listens, and its certificate, also used as a client")
    redis: RedisConfig = Field(description="the store, as the ACL user of keyspace `aggregator:`")
    registry: ClientConfig = Field(
        description="the registry, which keeps accepted and refused uploads for the audit log"
    )
    telemetry: TelemetryConfig = Field(TelemetryConfig(), description="logs and traces")
    standing: StandingConfig = Field(StandingConfig(), description="how suspended hospitals come to be known")
    uploads: UploadConfig = Field(UploadConfig(), description="limits of uploads")
    adding: AddingConfig = Field(AddingConfig(), description="how ciphertexts are added")
