"""Between protobuf messages and the registry's own types: performance over time."""

from collections.abc import Sequence
from typing import Any, Final

from fedmesh.registry.v1 import performance_pb2 as pb

from services.common.errors import Code, FedmeshError
from services.common.ids import require_name, require_uuid
from services.registry import wire
from services.registry.domain import performance as domain

_MAX_VERSIONS: Final = 100
_DEFAULT_VERSIONS: Final = 20
_MAX_DAYS: Final = 3660
_DEFAULT_DAYS: Final = 90
_MAX_VERSION: Final = 2**31 - 1 - _MAX_VERSIONS


def read_list(request: pb.ListPerformanceRequest) -> tuple[domain.Subject, int, int]:
    """What is asked for, the version before the first one, and how many versions.

    Raises: FedmeshError(INVALID_ARGUMENT).
    """
    after = _within(request.after_version, _MAX_VERSION, "after_version")
    versions = _within(request.page_size, _MAX_VERSIONS, "page_size") or _DEFAULT_VERSIONS
    job_id = require_uuid(request.job_id, "job_id")
    return domain.Subject(job_id, None, *_narrowed(request.name, request.hospital_id)), after, versions


def read_summarize(request: pb.SummarizePerformanceRequest) -> tuple[domain.Subject, int]:
    """What is asked for, and of how many days.

    Raises: FedmeshError(INVALID_ARGUMENT).
    """
    if bool(request.job_id) == bool(request.model):
        raise FedmeshError(Code.INVALID_ARGUMENT, "name a job or a model, one of them", field="job_id")
    days = _within(request.days, _MAX_DAYS, "days") or _DEFAULT_DAYS
    narrowed = _narrowed(request.name, request.hospital_id)
    if request.job_id:
        return domain.Subject(require_uuid(request.job_id, "job_id"), None, *narrowed), days
    return domain.Subject(None, require_name(request.model, "model"), *narrowed), days


def listed(measured: Sequence[domain.Measurement], last: int, after: int) -> pb.ListPerformanceResponse:
    """A page of whole versions, as many as one response takes. last: as `PerformanceUseCases.list` has it.

    Raises: FedmeshError(TOO_LARGE) when not even one version fits.
    """
    messages = [measurement(item) for item in measured]
    fitting = wire.fitting(messages)
    if len(fitting) < len(messages):
        # The version that was cut comes whole on the next page.
        last = messages[len(fitting)].version - 1
        fitting = [item for item in fitting if item.version <= last]
        if last <= after or not fitting:
            raise FedmeshError(Code.TOO_LARGE, f"version {last + 1} has too many numbers: ask for one name")
    return pb.ListPerformanceResponse(measurements=fitting, next_after_version=last)


def measurement(value: domain.Measurement) -> pb.Measurement:
    fields: dict[str, Any] = {
        "hospital_id": value.hospital_id,
        "version": value.version,
        "name": value.name,
        "value": value.value,
        "recorded_at": wire.within(value.recorded_at),
    }
    return pb.Measurement(**fields)


def daily(value: domain.DailyMeasurement) -> pb.DailyMeasurement:
    return pb.DailyMeasurement(
        hospital_id=value.hospital_id,
        name=value.name,
        day=value.day.isoformat(),
        points=value.points,
        lowest=value.lowest,
        highest=value.highest,
        mean=value.mean,
    )


def _narrowed(name: str, hospital_id: str) -> tuple[str | None, str | None]:
    wire.require_text(name, "name", domain.MAX_NAME)
    return name or None, require_name(hospital_id, "hospital_id") if hospital_id else None


def _within(value: int, limit: int, field: str) -> int:
    if value > limit:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{field} is {limit} at most", field=field)
    return value
