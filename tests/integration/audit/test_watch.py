"""How far behind its witnesses are, as the audit service shows it."""

import asyncio
from pathlib import Path

from prometheus_client import REGISTRY

from services.audit.store.postgres import PostgresStore
from services.audit.watch import WitnessWatch
from services.common.postgres import Database

from .conftest import Replica, World, event
from .hospitals import Hospitals


def age(name: str) -> float | None:
    return REGISTRY.get_sample_value("fedmesh_audit_witness_age_seconds", {"hospital": name})


async def test_a_witness_ages_from_the_first_entry_that_it_has_not_cosigned(
    world: World, replica: Replica, tmp_path: Path
) -> None:
    hospitals = Hospitals(world, tmp_path)
    database = Database(world.postgres.config("audit_service"))
    await database.open()
    try:
        watch = WitnessWatch(PostgresStore(database))
        await watch.look()
        assert age("east") is None, "nobody has cosigned yet"
        async with world.client(replica) as coordinator:
            await coordinator.append(event(number=1))
            assert await hospitals.look(replica, "east", "north") == ["cosigned", "cosigned"]
            await watch.look()
            assert (age("east"), age("north")) == (0.0, 0.0)
            await coordinator.append(event(number=2))
            await asyncio.sleep(0.01)
            await coordinator.append(event(number=3))
        assert await hospitals.look(replica, "north") == ["cosigned"]
        await watch.look()
        assert age("north") == 0.0
        behind = age("east")
        assert behind is not None
        assert behind > 0.01, "since the second entry, not the third"
        await WitnessWatch(PostgresStore(database)).look()
        assert (age("east") or 0) >= behind, "a replica that starts anew knows as much"
    finally:
        await database.close()
