"""Four hospital nodes around a centre that the test leads."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.embedded.ca import create_ca
from services.hospital_node.config import HospitalConfig
from services.plans.manifest import PlanManifest, canonical_bytes
from services.secure_sum.secret import generate_group_key
from tests.support.hospital import Centre, Node, changed_plan, deadline, hospital_config

HOSPITALS = ("h1", "h2", "h3", "h4")


class Consortium:
    """The centre, its hospitals and one job."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.ca = create_ca(folder / "ca", "consortium")
        self.centre = Centre(self.ca)
        self.group_key = generate_group_key()
        self.nodes = {
            name: Node(
                hospital_config(
                    folder, name, self.centre.config.listen, self.ca.issue_hospital(name), self.group_key, cache
                )
            )
            for name in HOSPITALS
        }
        self.plan_id = self.job_id = ""

    def reconfigure(self, hospital: str, **sections: Any) -> None:
        """Change a node's settings before it starts."""
        node = self.nodes[hospital]
        document = node.config.model_dump()
        for section, values in sections.items():
            document[section] = {**document[section], **values} if isinstance(values, dict) else values
        node.config = HospitalConfig.model_validate(document)
        node.trainers.config = node.config

    def create_job(self, plan: PlanManifest | None = None, cohort: Sequence[str] = HOSPITALS) -> None:
        manifest = canonical_bytes(plan or changed_plan())
        self.plan_id = hashlib.sha256(manifest).hexdigest()
        self.job_id = str(uuid.uuid4())
        self.centre.plans[self.plan_id] = manifest
        rounds = (plan or changed_plan()).rounds.count
        self.centre.jobs[self.job_id] = registry_pb2.Job(
            job_id=self.job_id, plan_id=self.plan_id, hospital_ids=cohort, rounds=rounds
        )

    def task(self, kind: Any, round_number: int = 1, attempt: int = 1, **fields: Any) -> pb.Task:
        """A task of the job; `base_version` and cohort as the coordinator would set them."""
        values: dict[str, Any] = {
            "kind": kind,
            "attempt": round_pb2.Attempt(job_id=self.job_id, round=round_number, attempt=attempt),
            "plan_id": self.plan_id,
            "base_version": round_number - 1,
            "deadline": deadline(),
            "cohort": self.centre.jobs[self.job_id].hospital_ids,
        }
        return pb.Task(**{**values, **fields})

    def tell(self, hospitals: Sequence[str], task: pb.Task) -> None:
        for hospital in hospitals:
            self.centre.send(hospital, task)

    async def start(self, hospitals: Sequence[str] = HOSPITALS) -> None:
        for hospital in hospitals:
            await self.nodes[hospital].start()
        await self.centre.connected(hospitals)

    async def restart(self, hospital: str) -> None:
        """Kill a node and start it again on the same folder."""
        await self.nodes[hospital].kill()
        self.centre.watching.pop(hospital, None)
        await self.nodes[hospital].start()
        await self.centre.connected([hospital])

    async def trained(self, members: Sequence[str] = HOSPITALS, **fields: Any) -> None:
        times = 1 + self.centre.count("ready") // len(members)
        self.tell(members, self.task(pb.TASK_KIND_TRAIN, **fields))
        await self.centre.reported("ready", members, times)

    async def uploaded(self, members: Sequence[str] = HOSPITALS, **fields: Any) -> None:
        times = 1 + self.centre.count("uploaded") // len(members)
        self.tell(members, self.task(pb.TASK_KIND_UPLOAD, group=members, **fields))
        await self.centre.reported("uploaded", members, times)

    def summed(self, members: Sequence[str] = HOSPITALS, round_number: int = 1, attempt: int = 1) -> dict[str, Any]:
        """Fix the sum; the fields that later tasks carry."""
        key = (self.job_id, round_number, attempt)
        contributions = self.centre.sum_up(key, members)
        sum_sha256 = hashlib.sha256(self.centre.sums[key]).hexdigest()
        return {
            "round_number": round_number,
            "attempt": attempt,
            "group": members,
            "contributions": contributions,
            "sum_sha256": sum_sha256,
        }

    async def round(
        self, members: Sequence[str] = HOSPITALS, round_number: int = 1, base: str = "", attempt: int = 1
    ) -> str:
        """Lead a whole round; the SHA-256 of its state."""
        where = {"round_number": round_number, "base_state_sha256": base, "attempt": attempt}
        self.centre.reports.clear()
        await self.trained(members, **where)
        await self.uploaded(members, **where)
        fields = {**self.summed(members, round_number, attempt), "base_state_sha256": base}
        self.tell(members, self.task(pb.TASK_KIND_DECRYPT, **fields))
        digests = await self.centre.reported("digest", members)
        assert len({request.digest for request in digests.values()}) == 1
        fields["finalizer"] = members[0]
        self.tell(members, self.task(pb.TASK_KIND_FINALIZE, **fields))
        state = (await self.centre.reported("state", members[:1]))[members[0]].state_sha256
        fields["next_state_sha256"] = state
        self.tell(members[1:], self.task(pb.TASK_KIND_ATTEST, **fields))
        verdicts = await self.centre.reported("attest", members[1:])
        assert all(request.agrees for request in verdicts.values()), verdicts
        self.tell(
            [name for name in self.nodes if name in self.centre.watching],
            self.task(pb.TASK_KIND_COMMITTED, **{**fields, "base_version": round_number}),
        )
        return str(state)

    async def close(self) -> None:
        await asyncio.gather(*(node.kill() for node in self.nodes.values()))
        await self.centre.stop()


@pytest.fixture(scope="session")
def noise_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrating takes seconds, and every test here uses the same few plans."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
async def consortium(tmp_path: Path, noise_cache: Path) -> AsyncIterator[Consortium]:
    made = Consortium(tmp_path, noise_cache)
    await made.centre.start()
    try:
        yield made
    finally:
        await made.close()
