"""Settings of the aggregator."""

import os
from pathlib import Path

from pydantic import Field

from services.common.config import ClientConfig, RedisConfig, Section, ServerConfig, TelemetryConfig
from services.common.standing import StandingConfig


class UploadConfig(Section):
    max_concurrent: int = Field(64, ge=1, le=1000, description="uploads received at once; more are told to come again")
    idle_s: float = Field(
        30.0, gt=0, le=3600, description="seconds that an upload may stand still before it is dropped"
    )


class ComputingConfig(Section):
    workers: int = Field(
        default_factory=lambda: min(4, len(os.sched_getaffinity(0))),
        ge=1,
        le=64,
        description="disposable processes that check and add ciphertexts; by default one a CPU, at most 4",
    )
    timeout_s: float = Field(
        30.0, gt=0, le=600, description="seconds after which a worker that does not answer is killed"
    )


class ChunksConfig(Section):
    directory: Path | None = Field(
        None,
        description="folder for the segments of uploads and sums, on a volume that all replicas share; without it they "
        "are kept in Redis, which is enough for up to some ten million parameters",
    )
    sweep_s: float = Field(60.0, gt=0, le=3600, description="seconds between looks for segments that are over")


class AggregatorConfig(Section):
    server: ServerConfig = Field(description="where the aggregator listens, and its certificate, also used as a client")
    redis: RedisConfig = Field(description="the store, as the ACL user of keyspace `aggregator:`")
    registry: ClientConfig = Field(
        description="the registry, which keeps accepted and refused uploads for the audit log"
    )
    telemetry: TelemetryConfig = Field(TelemetryConfig(), description="logs and traces")
    standing: StandingConfig = Field(StandingConfig(), description="how suspended hospitals come to be known")
    uploads: UploadConfig = Field(UploadConfig(), description="limits of uploads")
    computing: ComputingConfig = Field(ComputingConfig(), description="how ciphertexts are checked and added")
    chunks: ChunksConfig = Field(ChunksConfig(), description="where the segments of uploads and sums are kept")
