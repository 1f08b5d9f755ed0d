"""`fedmesh models performance`: how versions and hospitals did over time."""

import asyncio
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final

import typer
from fedmesh.registry.v1 import performance_pb2 as pb
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from services.cli.centre import CentreFile, find_place
from services.cli.inspection import newest_job
from services.cli.mesh import reach, stub
from services.cli.stack import DEMO_DIR, DemoDir
from services.cli.tables import make_table
from services.cli.versions import find_job
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call

_NEEDS: Final = ("audit", "registry")
# Of one job: its rounds are 10,000 at most.
_PAGE: Final = 100
_BARS: Final = "▁▂▃▄▅▆▇█"
_WIDEST: Final = 40


def performance(
    job: Annotated[str, typer.Argument(help="Job, or its first characters; the newest job by default")] = "",
    model: Annotated[str, typer.Option(help="All jobs of this model, by day, instead of one job")] = "",
    name: Annotated[str, typer.Option(help="Only this number, such as auroc or contributed")] = "",
    hospital: Annotated[str, typer.Option(help="Only of this hospital")] = "",
    by_day: Annotated[bool, typer.Option("--by-day", help="Days of the job instead of versions")] = False,
    days: Annotated[int, typer.Option(min=1, max=3660, help="How many days back, with --by-day or --model")] = 90,
    folder: DemoDir = None,
    centre: CentreFile = None,
) -> None:
    """Show what was measured of each version, of the joint model and of each hospital, over time."""
    if job and model:
        raise FedmeshError(Code.INVALID_ARGUMENT, "a job and --model exclude each other")
    with reach(find_place(folder, centre, DEMO_DIR), _NEEDS) as opened:

        async def read() -> RenderableType:
            async with stub(opened, "registry") as registry, stub(opened, "performance") as service:
                if model:
                    return await _by_day(service, name, hospital, days, model=model)
                found = await find_job(registry, job) if job else await newest_job(registry)
                if by_day:
                    return await _by_day(service, name, hospital, days, job_id=found)
                return Group(Text(f"job {found}"), of_job(await _measurements(service, found, name, hospital)))

        shown = asyncio.run(read())
    Console().print(shown)


async def _measurements(service: Any, job_id: str, name: str, hospital: str) -> list[pb.Measurement]:
    found: list[pb.Measurement] = []
    after = 0
    while True:
        request = pb.ListPerformanceRequest(
            job_id=job_id, name=name, hospital_id=hospital, after_version=after, page_size=_PAGE
        )
        page: pb.ListPerformanceResponse = await call(service.ListPerformance, request)
        found.extend(page.measurements)
        after = page.next_after_version
        if not after:
            return found


async def _by_day(service: Any, name: str, hospital: str, days: int, **subject: str) -> RenderableType:
    request = pb.SummarizePerformanceRequest(name=name, hospital_id=hospital, days=days, **subject)
    found: pb.SummarizePerformanceResponse = await call(service.SummarizePerformance, request)
    return of_days(found.days)


def of_job(measured: Sequence[pb.Measurement]) -> RenderableType:
    """The numbers of one job: those of the joint model by version, and a line for each hospital."""
    if not measured:
        return Text("nothing was measured, or nothing of it is kept any more")
    joint = [one for one in measured if not one.hospital_id]
    hospitals = [one for one in measured if one.hospital_id]
    parts: list[RenderableType] = []
    if joint:
        parts += [_joint(joint), *_curves(joint)]
    if hospitals:
        parts += [_hospitals(hospitals)]
    return Group(*parts)


def of_days(days: Sequence[pb.DailyMeasurement]) -> RenderableType:
    """Numbers by day."""
    if not days:
        return Text("nothing was measured in these days, or there is no such model")
    table = make_table("day", "of", "number", "points", "lowest", "mean", "highest")
    for one in days:
        figures = (_figure(value) for value in (one.lowest, one.mean, one.highest))
        table.add_row(one.day, one.hospital_id or "joint model", one.name, str(one.points), *figures)
    return table


def spark(values: Sequence[float], widest: int = _WIDEST) -> str:
    """A line of bars from the lowest to the highest value; the newest `widest` values."""
    values = values[-widest:]
    low, high = min(values), max(values)
    if low == high:
        return _BARS[len(_BARS) // 2] * len(values)
    return "".join(_BARS[round((value - low) / (high - low) * (len(_BARS) - 1))] for value in values)


def _joint(joint: Sequence[pb.Measurement]) -> Table:
    names = sorted({one.name for one in joint})
    by_version: dict[int, dict[str, pb.Measurement]] = {}
    for one in joint:
        by_version.setdefault(one.version, {})[one.name] = one
    table = make_table("version", "recorded (UTC)", *names)
    for version, numbers in sorted(by_version.items()):
        recorded = next(iter(numbers.values())).recorded_at.ToDatetime().isoformat(" ", "seconds")
        table.add_row(
            str(version), recorded, *(_figure(numbers[name].value) if name in numbers else "" for name in names)
        )
    return table


def _curves(joint: Sequence[pb.Measurement]) -> Iterable[Text]:
    for name in sorted({one.name for one in joint}):
        values = [one.value for one in joint if one.name == name]
        if len(values) > 1:
            yield Text(f"{name}  {spark(values)}  {_figure(values[0])} to {_figure(values[-1])}")


def _hospitals(measured: Sequence[pb.Measurement]) -> Table:
    """A row for each hospital and number: how many rounds it is of, its mean and range."""
    series: dict[tuple[str, str], list[float]] = {}
    for one in measured:
        series.setdefault((one.hospital_id, one.name), []).append(one.value)
    table = make_table("hospital", "number", "points", "lowest", "mean", "highest", "over time")
    for (hospital, name), values in sorted(series.items()):
        figures = (_figure(value) for value in (min(values), sum(values) / len(values), max(values)))
        table.add_row(hospital, name, str(len(values)), *figures, spark(values, 20))
    return table


def _figure(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() and abs(value) < 1e9 else f"{value:.4g}"
