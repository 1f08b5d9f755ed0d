"""What Prometheus sees of the sums."""

from typing import Final

from prometheus_client import Counter, Gauge, Histogram

_SECONDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)

UPLOADS: Final = Counter("fedmesh_aggregator_uploads_total", "Uploads that ended", ["outcome"])
UPLOAD_BYTES: Final = Counter(
    "fedmesh_aggregator_upload_bytes_total", "Bytes of segments that were received and are sound"
)
UPLOAD_SECONDS: Final = Histogram(
    "fedmesh_aggregator_upload_seconds", "Time from an upload's header to its count", buckets=_SECONDS
)
UPLOADING: Final = Gauge("fedmesh_aggregator_uploads_in_flight", "Uploads that this replica is receiving")
STRIKES: Final = Counter("fedmesh_aggregator_strikes_total", "Uploads that no honest hospital sends", ["code"])
COMPUTE_SECONDS: Final = Histogram(
    "fedmesh_aggregator_compute_seconds", "Time that a sum took to compute", buckets=_SECONDS
)
DOWNLOAD_BYTES: Final = Counter(
    "fedmesh_aggregator_download_bytes_total", "Bytes of sums that hospitals downloaded, segments for checks left out"
)
WAITING: Final = Gauge("fedmesh_aggregator_waiting_segments", "Segments that wait for a worker process")
COMPUTE_BYTES: Final = Counter("fedmesh_aggregator_compute_bytes_total", "Bytes of uploads that were added to sums")
