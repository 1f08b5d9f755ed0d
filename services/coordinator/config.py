"""Settings of the coordinator."""

from pydantic import Field

from services.common.config import Address, ClientConfig, RedisConfig, Section, ServerConfig, TelemetryConfig
from services.common.standing import StandingConfig


class RoundConfig(Section):
    absence_grace_s: float = Field(
        3.0, ge=0, le=3600, description="seconds after which a disconnected hospital is no longer waited for"
    )
    answer_grace_s: float = Field(
        2.0, ge=0, le=3600, description="seconds for late digests and attestations once a quorum has answered"
    )
    max_attempts: int = Field(
        5, ge=1, le=1000, description="attempts at one round before the job fails; a plan with privacy may allow fewer"
    )


class DriverConfig(Section):
    job_poll_s: float = Field(1.0, gt=0, le=60, description="seconds between looks at the registry for running jobs")
    lease_s: float = Field(
        3.0, ge=0.5, le=60, description="seconds after which another replica takes over the jobs of a dead one"
    )
    call_timeout_s: float = Field(5.0, gt=0, le=60, description="deadline of one call to registry or aggregator")


class TaskConfig(Section):
    heartbeat_s: float = Field(2.0, gt=0, le=5, description="seconds between heartbeats on an idle task stream")
    presence_s: float = Field(
        6.0, ge=1, le=60, description="seconds after which a hospital counts as gone when its replica has died"
    )


class RateConfig(Section):
    per_second: float = Field(20.0, gt=0, le=10_000, description="reports that one hospital may send in the long run")
    burst: int = Field(60, ge=1, le=100_000, description="reports that one hospital may send at once")


class CoordinatorConfig(Section):
    server: ServerConfig = Field(
        description="where the coordinator listens, and its certificate, also used as a client"
    )
    redis: RedisConfig = Field(description="the store, as the ACL user of keyspace `coordinator:`")
    registry: ClientConfig = Field(description="the registry: jobs, attempts, commits, events")
    aggregator: ClientConfig = Field(description="the aggregator, whose sums are opened and closed")
    telemetry: TelemetryConfig = Field(TelemetryConfig(), description="logs and traces")
    rounds: RoundConfig = Field(
        RoundConfig(), description="patience with hospitals; phase deadlines come from the plan"
    )
    driver: DriverConfig = Field(DriverConfig(), description="how replicas share the jobs")
    tasks: TaskConfig = Field(TaskConfig(), description="task streams to hospitals")
    standing: StandingConfig = Field(StandingConfig(), description="how suspended hospitals come to be known")
    rate: RateConfig = Field(RateConfig(), description="limit of each hospital's reports")
    ops_listen: Address | None = Field(
        None,
        description="host:port of the read-only ops page, plain HTTP without a login: loopback, such as 127.0.0.1:7190",
    )
