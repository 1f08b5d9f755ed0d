"""Performance over time through the API: what operators and hospitals are told of versions, hospitals and days."""

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from fedmesh.registry.v1 import performance_pb2 as pf
from rich.console import Console

from services.cli.performance import of_days, of_job
from services.common.errors import Code
from services.common.grpc.client import call
from tests.integration.registry.harness import HOSPITALS, Registry, burning, code
from tests.integration.registry.test_promotion import MODEL, a_job, report, run

NORTH, SOUTH, STRANGER = HOSPITALS[0], HOSPITALS[1], HOSPITALS[-1]


def today() -> str:
    return datetime.now(UTC).date().isoformat()


async def listed(registry: Registry, by: str = "", **asked: Any) -> list[pf.Measurement]:
    """All pages, one version each, as an operator or as a hospital."""
    stub = registry.performance(by, "hospital") if by else registry.performance()
    found: list[pf.Measurement] = []
    after, first = 0, True
    while after or first:
        request = pf.ListPerformanceRequest(after_version=after, page_size=1, **asked)
        page = await call(stub.ListPerformance, request)
        assert {one.version for one in page.measurements} <= {after + 1}
        found.extend(page.measurements)
        first, after = False, page.next_after_version
    return found


async def days(registry: Registry, by: str = "", **asked: Any) -> list[pf.DailyMeasurement]:
    stub = registry.performance(by, "hospital") if by else registry.performance()
    return list((await call(stub.SummarizePerformance, pf.SummarizePerformanceRequest(**asked))).days)


def told(found: Any) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found)
    return console.export_text()


def series(found: list[pf.Measurement], hospital: str, name: str) -> list[float]:
    return [one.value for one in found if (one.hospital_id, one.name) == (hospital, name)]


async def burnt_rounds_say_who_contributed_and_no_more(registry: Registry) -> None:
    job = await registry.job(*HOSPITALS[:4])
    attempt, _ = await registry.ready(job)
    await call(registry.service().CommitRound, burning(job, 1, attempt))
    found = await listed(registry, job_id=job.job_id)
    assert {one.name for one in found} == {"contributed", "contribution_age"}
    assert {one.hospital_id for one in found} == set(HOSPITALS[:4])


async def bad_questions_are_refused(registry: Registry, job_id: str) -> None:
    stub = registry.performance()
    for bad in (
        {"job_id": "x"},
        {"job_id": job_id, "page_size": 101},
        {"job_id": job_id, "after_version": 2**32 - 1},
        {"job_id": job_id, "hospital_id": "No Name"},
        {"job_id": job_id, "name": "a" * 101},
    ):
        assert await code(call(stub.ListPerformance, pf.ListPerformanceRequest(**bad))) is Code.INVALID_ARGUMENT, bad
    for bad in ({}, {"job_id": job_id, "model": MODEL}, {"model": "No Name"}, {"model": MODEL, "days": 3661}):
        request = pf.SummarizePerformanceRequest(**bad)
        assert await code(call(stub.SummarizePerformance, request)) is Code.INVALID_ARGUMENT, bad
    service = registry.stub(registry._tls("service", "coordinator"), type(stub))
    assert await code(call(service.ListPerformance, pf.ListPerformanceRequest(job_id=job_id))) is Code.PERMISSION_DENIED


async def test_versions_hospitals_and_days_as_each_may_see_them(registry: Registry) -> None:
    began = today()
    job = await a_job(registry, *HOSPITALS[:4])
    await run(registry, job, 0.60, 0.63, 0.64)
    await report(registry, job, NORTH)
    whole = await listed(registry, job_id=job.job_id)
    assert [one.version for one in whole] == sorted(one.version for one in whole)
    assert series(whole, "", "auroc") == [0.60, 0.63, 0.64]
    assert series(whole, NORTH, "contribution_age") == [0, 1, 1]
    assert series(whole, SOUTH, "contribution_age") == [0, 0, 0]
    assert series(whole, SOUTH, "agreed") == series(whole, SOUTH, "contributed") == [1, 1, 1]
    # What a hospital signed of a version, written in its own name.
    assert series(whole, NORTH, "saturation.auc") == [0.51]
    assert series(whole, SOUTH, "saturation.auc") == []

    own = await listed(registry, NORTH, job_id=job.job_id)
    assert {one.hospital_id for one in own} == {"", NORTH}
    assert [one for one in whole if one.hospital_id in ("", NORTH)] == own
    assert await listed(registry, NORTH, job_id=job.job_id, hospital_id=SOUTH) == []
    assert series(await listed(registry, job_id=job.job_id, hospital_id=SOUTH), SOUTH, "agreed") == [1, 1, 1]
    assert {one.name for one in await listed(registry, job_id=job.job_id, name="auroc")} == {"auroc"}

    by_day = await days(registry, model=MODEL, name="auroc")
    # Two days if it is midnight just now.
    assert {one.hospital_id for one in by_day} == {""}
    assert {one.day for one in by_day} <= {began, today()}
    assert (min(one.lowest for one in by_day), max(one.highest for one in by_day)) == (0.60, 0.64)
    assert sum(one.points for one in by_day) == 3
    assert sum(one.points * one.mean for one in by_day) / 3 == pytest.approx(0.6233, abs=1e-4)
    assert await days(registry, job_id=job.job_id, name="auroc") == by_day
    assert {one.hospital_id for one in await days(registry, NORTH, model=MODEL)} == {"", NORTH}
    assert await days(registry, NORTH, job_id=job.job_id, hospital_id=SOUTH) == []
    assert await days(registry, model="no-such-model") == []

    # A hospital outside of the job learns nothing of it, not even that it is there.
    stranger = registry.performance(STRANGER, "hospital")
    for question in (
        call(stranger.ListPerformance, pf.ListPerformanceRequest(job_id=job.job_id)),
        call(stranger.SummarizePerformance, pf.SummarizePerformanceRequest(job_id=job.job_id)),
    ):
        assert await code(question) is Code.NOT_FOUND
    assert await days(registry, STRANGER, model=MODEL) == []

    shown = told(of_job(whole))
    assert "auroc  ▁▆█  0.6 to 0.64" in shown
    assert all(name in shown for name in HOSPITALS[:4])
    assert f"{by_day[0].day} joint model auroc" in " ".join(told(of_days(by_day)).split())

    await burnt_rounds_say_who_contributed_and_no_more(registry)
    await bad_questions_are_refused(registry, job.job_id)
