"""Four hospital nodes around a centre that the test leads."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.registry.v1 import registry_pb2

from services.embedded.ca import create_ca
from services.hospital_node.config import HospitalConfig
from services.hospital_node.store.epochs import EpochFiles
from services.hospital_node.usecases.states import open_newest
from services.hospital_node.wire import parse_signed, wire_signed
from services.plans.manifest import PlanManifest, canonical_bytes
from services.secure_sum import opening
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import MemberKeys, load_roster_file
from services.secure_sum.statements import AttemptRef, Share, Signed, parse
from tests.support.centre import Centre
from tests.support.hospital import Node, changed_plan, deadline, found_roster, hospital_config

HOSPITALS = ("h1", "h2", "h3", "h4")
Key = tuple[str, int, int]


class Consortium:
    """The centre, its hospitals and one job. `ghosts` are hospitals without a node, played by the test."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.ca = create_ca(folder / "ca", "consortium")
        self.centre = Centre(self.ca)
        self.keys = {name: MemberKeys.generate(name) for name in HOSPITALS}
        found_roster(folder / "roster.json", "consortium", list(self.keys.values()))
        self.roster = load_roster_file(folder / "roster.json")
        self.centre.publish_roster(self.roster, self.roster.statement.encode(), {})
        self.nodes = {
            name: Node(
                hospital_config(
                    folder,
                    keys,
                    self.centre.config.listen,
                    self.ca.issue_hospital(name),
                    folder / "roster.json",
                    cache,
                )
            )
            for name, keys in self.keys.items()
        }
        self.ghosts: dict[tuple[Key, str], MemberState] = {}
        self.papers: dict[Key, dict[str, Any]] = {}
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
            job_id=self.job_id,
            plan_id=self.plan_id,
            hospital_ids=cohort,
            rounds=rounds,
            roster_sha256=self.roster.sha256,
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
            "roster_sha256": self.roster.sha256,
            "epoch": 1,
        }
        known = self.papers.get((self.job_id, round_number, attempt), {})
        return pb.Task(**{**values, **known, **fields})

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

    async def again(self, kind: str, members: Sequence[str], ask: Callable[[], None]) -> None:
        """Ask for something, and wait until each of `members` has reported it once more than before."""

        def counts() -> list[int]:
            sent = [hospital for hospital, name, _ in self.centre.reports if name == kind]
            return [sent.count(member) for member in members]

        before = counts()
        ask()
        await self.centre.until(
            lambda: all(now > then for now, then in zip(counts(), before, strict=True)), f"{kind} from {list(members)}"
        )

    async def trained(self, members: Sequence[str] = HOSPITALS, **fields: Any) -> None:
        await self.again("ready", members, lambda: self.tell(members, self.task(pb.TASK_KIND_TRAIN, **fields)))

    # ---- what the centre makes of what it was told

    def told(self, kind: str, key: Key) -> dict[str, Any]:
        """The last report of a kind in an attempt by hospital."""
        return {
            hospital: request
            for hospital, name, request in self.centre.reports
            if name == kind and (request.attempt.job_id, request.attempt.round, request.attempt.attempt) == key
        }

    def _ghost(self, key: Key, name: str) -> MemberState:
        if (key, name) not in self.ghosts:
            attempt = AttemptRef(job_id=key[0], round=key[1], attempt=key[2])
            cohort = list(self.centre.jobs[self.job_id].hospital_ids)
            self.ghosts[key, name] = Member(self.keys[name], self.roster).begin(attempt, 1, cohort)
        return self.ghosts[key, name]

    def sealed(self, group: Sequence[str] = HOSPITALS, round_number: int = 1, attempt: int = 1) -> list[Signed]:
        """Fix the group: the adverts of nodes that reported ready, and of ghosts."""
        key = (self.job_id, round_number, attempt)
        ready = self.told("ready", key)
        adverts = [
            parse_signed(ready[name].advert) if name in ready else self._ghost(key, name).advert for name in group
        ]
        self.papers[key] = {"group": group, "adverts": [wire_signed(advert) for advert in sorted(adverts)]}
        return adverts

    async def shared(self, members: Sequence[str] = HOSPITALS, group: Sequence[str] = HOSPITALS, **where: Any) -> None:
        """Seal the group, and let its nodes share; the ghosts in it share as well."""
        key = self._key(where)
        adverts = self.sealed(group, *key[1:])
        self.tell(members, self.task(pb.TASK_KIND_SHARE, **where))
        await self.centre.until(lambda: set(members) <= set(self.told("shares", key)), f"shares of {members}")
        for name in set(group) - set(members):
            if (key, name) in self.ghosts:
                self.ghosts[key, name] = Member(self.keys[name], self.roster).share(self.ghosts[key, name], adverts)
        self.papers[key]["sharers"] = group

    def shares_for(self, name: str, key: Key) -> list[Any]:
        """What the sharers sealed for a hospital."""
        dealt = [parse_signed(item) for report in self.told("shares", key).values() for item in report.shares]
        dealt += [item for (of, _), state in self.ghosts.items() if of == key for item in state.shares_out]
        sharers = self.papers[key]["sharers"]
        return [
            wire_signed(item)
            for item in sorted(dealt)
            if parse(Share, item.statement).recipient == name and item.hospital_id in sharers
        ]

    def upload_task(self, name: str, **where: Any) -> pb.Task:
        return self.task(pb.TASK_KIND_UPLOAD, shares=self.shares_for(name, self._key(where)), **where)

    def ask_upload(self, members: Sequence[str], **where: Any) -> None:
        for name in members:
            self.tell([name], self.upload_task(name, **where))

    async def uploaded(
        self, members: Sequence[str] = HOSPITALS, group: Sequence[str] = HOSPITALS, **where: Any
    ) -> None:
        """Share if that was not done, then upload."""
        key = self._key(where)
        if "sharers" not in self.papers.get(key, {}):
            await self.shared(members, group, **where)
        await self.again("uploaded", members, lambda: self.ask_upload(members, **where))

    def listed(self, survivors: Sequence[str] = HOSPITALS, round_number: int = 1, attempt: int = 1) -> bytes:
        """Close the uploads: the list of survivors, which later tasks carry."""
        key = (self.job_id, round_number, attempt)
        papers, told = self.papers[key], self.told("uploaded", key)
        uploads = {name: parse_signed(told[name].upload) for name in survivors}
        adverts = [parse_signed(item) for item in papers["adverts"]]
        named = AttemptRef(job_id=key[0], round=key[1], attempt=key[2])
        statement = opening.survivors_statement(self.roster, 1, named, adverts, papers["sharers"], uploads)
        papers["survivors"] = statement
        papers["contributions"] = [
            round_pb2.Contribution(hospital_id=name, ciphertext_sha256=told[name].ciphertext_sha256)
            for name in survivors
        ]
        return statement

    async def confirmed(self, survivors: Sequence[str] = HOSPITALS, **where: Any) -> None:
        key = self._key(where)
        self.listed(survivors, *key[1:])
        self.tell(survivors, self.task(pb.TASK_KIND_CONFIRM, **where))
        await self.centre.until(lambda: set(survivors) <= set(self.told("confirm", key)), "confirmations")
        self.papers[key]["confirmations"] = [
            round_pb2.Signature(hospital_id=name, signature=request.signature)
            for name, request in self.told("confirm", key).items()
        ]

    async def unmasked(self, survivors: Sequence[str] = HOSPITALS, **where: Any) -> None:
        """Let the survivors confirm and reveal, and compute the sum; later tasks carry what DECRYPT needs."""
        key = self._key(where)
        await self.confirmed(survivors, **where)
        self.tell(survivors, self.task(pb.TASK_KIND_UNMASK, **where))
        await self.centre.until(lambda: set(survivors) <= set(self.told("reveal", key)), "reveals")
        self.compute(survivors, *key[1:])

    def compute(self, survivors: Sequence[str] = HOSPITALS, round_number: int = 1, attempt: int = 1) -> None:
        key = (self.job_id, round_number, attempt)
        papers = self.papers[key]
        adverts = [parse_signed(item) for item in papers["adverts"]]
        dealt = [item for name in survivors for item in map(parse_signed, self.shares_for(name, key))]
        reveals = [parse_signed(request.reveal) for request in self.told("reveal", key).values()]
        for reveal in reveals:
            opening.check_reveal(reveal, self.roster, papers["survivors"], dealt)
        opened = opening.open_masks(self.roster, papers["survivors"], adverts, reveals)
        named = AttemptRef(job_id=key[0], round=key[1], attempt=key[2])
        keys = opening.mask_keys(adverts, self.roster, papers["sharers"])
        plan = opening.correction(named, keys, survivors, opened)
        papers["sum_sha256"] = self.centre.sum_up(key, survivors, plan)
        papers["uploads"] = [self.told("uploaded", key)[name].upload for name in survivors]
        papers["opening"] = round_pb2.Opening(
            self_seeds=[round_pb2.OpenedSeed(hospital_id=n, seed=seed) for n, seed in opened.self_seeds.items()],
            mask_seeds=[round_pb2.OpenedSeed(hospital_id=n, seed=seed) for n, seed in opened.mask_seeds.items()],
        )

    async def opened(self, members: Sequence[str] = HOSPITALS, **where: Any) -> None:
        """Everything from training to the computed sum."""
        await self.trained(members, **where)
        await self.uploaded(members, members, **where)
        await self.unmasked(members, **where)

    async def round(
        self, members: Sequence[str] = HOSPITALS, round_number: int = 1, base: str = "", attempt: int = 1
    ) -> str:
        """Lead a whole round; the SHA-256 of its sealed state."""
        where: dict[str, Any] = {"round_number": round_number, "base_state_sha256": base, "attempt": attempt}
        self.centre.reports.clear()
        await self.opened(members, **where)
        self.tell(members, self.task(pb.TASK_KIND_DECRYPT, finalizer=members[0], **where))
        digests = await self.centre.reported("digest", members)
        assert len({(request.digest, request.next_state_sha256) for request in digests.values()}) == 1
        state = str(digests[members[0]].next_state_sha256)
        assert state in self.centre.blobs, "the finalizer stores its state before it sends its digest"
        last = {**where, "base_version": round_number, "next_state_sha256": state}
        present = [name for name in self.nodes if name in self.centre.watching]
        self.tell(present, self.task(pb.TASK_KIND_COMMITTED, **last))
        return state

    def open_state(self, sha256: str, newest: int) -> bytes:
        """A stored state in the clear, by the keys of a hospital that has them."""
        for node in self.nodes.values():
            if (node.config.data_dir / "epochs").is_dir():
                keys = EpochFiles(node.config.data_dir).load(self.roster.sha256, 1)
                if keys is not None:
                    return open_newest(keys, self.job_id, newest, self.centre.blobs[sha256])[1]
        raise AssertionError("no hospital has the epoch's keys")

    def _key(self, where: dict[str, Any]) -> Key:
        return self.job_id, where.get("round_number", 1), where.get("attempt", 1)

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
