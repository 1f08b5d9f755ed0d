"""What the registry shows of hospitals and of its database: standing, strikes, budgets, connections."""

from datetime import timedelta

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2 as pb
from fedmesh.registry.v1.budget_pb2 import ListBudgetsRequest
from prometheus_client import REGISTRY

from services.common.clock import SystemClock
from services.common.config import PostgresConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.ids import new_id
from services.common.postgres import Database
from services.common.postgres_watch import PostgresWatch
from services.privacy.chain import RELEASED, next_entry
from services.registry.config import BudgetConfig, StrikeConfig
from services.registry.watch import HospitalWatch
from tests.integration.registry.harness import HOSPITALS, Registry
from tests.integration.registry.test_ledgers import NORTH, SOUTH, chain, report

WINDOW_S = timedelta(hours=1).total_seconds()


def shown(metric: str, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(f"fedmesh_{metric}", labels)


async def test_budgets_follow_from_what_hospitals_reported(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    watch = HospitalWatch(registry.store, SystemClock(), BudgetConfig(), StrikeConfig(window_s=WINDOW_S))
    await watch.look()
    assert [shown("registry_epsilon_left", hospital=name) for name in HOSPITALS] == [0.5] * len(HOSPITALS)
    entries = chain("job", charges=0)
    await report(registry, entries)
    await watch.look()
    assert shown("registry_epsilon_left", hospital=NORTH) == 0.0
    assert shown("registry_epsilon_left", hospital=SOUTH) == 0.5
    await report(registry, [next_entry(entries[-1].head, RELEASED, "2026-06-02T00:00:00+00:00", job_id="job")])
    await watch.look()
    assert shown("registry_epsilon_left", hospital=NORTH) == 0.5


async def test_budgets_are_told_to_who_needs_no_ledger(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    with pytest.raises(FedmeshError, match="not read yet"):
        await call(registry.budgets().ListBudgets, ListBudgetsRequest())
    await report(registry, chain("job", charges=0))
    await registry.watch.look()
    told = await call(registry.budgets().ListBudgets, ListBudgetsRequest())
    assert {item.hospital_id: item.epsilon_left for item in told.budgets} == dict.fromkeys(HOSPITALS, 0.5) | {NORTH: 0}
    assert told.epsilon_limit == 0.5
    with pytest.raises(FedmeshError) as caught:
        await call(registry.budgets(NORTH, "hospital").ListBudgets, ListBudgetsRequest())
    assert caught.value.code is Code.PERMISSION_DENIED


async def test_standing_and_strikes(registry: Registry) -> None:
    await registry.found(*HOSPITALS)
    job = await registry.job()
    struck = pb.RecordStrikeRequest(
        request_id=new_id(),
        hospital_id=NORTH,
        code="statement-invalid",
        reason="forged",
        attempt=round_pb2.Attempt(job_id=job.job_id, round=1, attempt=1),
    )
    await call(registry.service().RecordStrike, struck)
    suspend = pb.SetHospitalStatusRequest(
        request_id=new_id(), hospital_id=SOUTH, status=pb.HOSPITAL_STATUS_SUSPENDED, reason="a drill"
    )
    await call(registry.operator().SetHospitalStatus, suspend)
    await HospitalWatch(registry.store, SystemClock(), BudgetConfig(), StrikeConfig(limit=5)).look()
    assert (shown("registry_hospital_strikes", hospital=NORTH), shown("registry_strike_limit")) == (1.0, 5.0)
    assert shown("registry_hospital_status", hospital=SOUTH, status="suspended") == 1.0
    assert shown("registry_hospital_status", hospital=SOUTH, status="active") == 0.0
    assert shown("registry_hospital_status", hospital=NORTH, status="active") == 1.0


async def test_postgres_says_how_full_it_is_and_that_it_is_away(registry: Registry) -> None:
    await PostgresWatch(registry.pool).look()
    assert shown("postgres_up") == 1.0
    assert 1 <= (shown("postgres_connections") or 0) < (shown("postgres_connections_max") or 0)
    assert (shown("postgres_standbys"), shown("postgres_wal_archive_failed")) == (0.0, 0.0)
    assert (shown("postgres_pool_connections", state="busy") or 0) + (
        shown("postgres_pool_connections", state="free") or 0
    ) >= 1
    nowhere = Database(PostgresConfig(dsn="host=127.0.0.1 port=1 dbname=none user=nobody"))
    await nowhere.open()
    try:
        await PostgresWatch(nowhere).look()
    finally:
        await nowhere.close()
    assert shown("postgres_up") == 0.0
