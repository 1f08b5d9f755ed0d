"""What Prometheus sees of the rounds."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

from services.coordinator.domain.machine import Cause

_PHASE_BUCKETS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 3600.0)

ATTEMPTS: Final = Counter("fedmesh_coordinator_attempts_total", "Attempts that ended", ["outcome"])
for _outcome in ("committed", "burnt", "aborted"):
    ATTEMPTS.labels(_outcome)
JOBS_FAILED: Final = Counter("fedmesh_coordinator_jobs_failed_total", "Jobs that were ended as failed", ["cause"])
for _cause in Cause:
    JOBS_FAILED.labels(_cause.value)
PHASE_SECONDS: Final = Histogram(
    "fedmesh_coordinator_phase_seconds", "Time that an attempt spent in a phase", ["phase"], buckets=_PHASE_BUCKETS
)
OVERHEAD_SECONDS: Final = Histogram(
    "fedmesh_coordinator_round_overhead_seconds",
    "Time from sealing a group to the commit of its round",
    buckets=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 60.0),
)
REFUSED: Final = Counter(
    "fedmesh_coordinator_statements_refused_total", "Statements that no honest hospital sends", ["method"]
)
CONNECTED: Final = Gauge("fedmesh_coordinator_task_streams", "Task streams that this replica serves")
HOSPITALS: Final = Gauge(
    "fedmesh_coordinator_hospital_streams", "Task streams of a hospital that this replica serves", ["hospital"]
)
UNREAD: Final = Gauge("fedmesh_coordinator_unread_tasks", "Tasks and heartbeats that hospitals have not read yet")
RUNNING: Final = Gauge("fedmesh_coordinator_running_jobs", "Jobs that the registry calls running")
LEASES: Final = Gauge("fedmesh_coordinator_leases", "Jobs that this replica drives")
