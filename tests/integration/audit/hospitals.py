"""Hospitals as witnesses, each with a disk of its own."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from services.common.clock import SystemClock
from services.common.grpc.client import MeshChannel
from services.hospital_node.audit_log import GrpcAuditLog
from services.hospital_node.store.state import SqliteNodeState
from services.hospital_node.usecases.witness import Witness
from services.secure_sum.roster import MemberKeys, Roster, as_roster, found

from .conftest import CONSORTIUM, Replica, World

NAMES = ("east", "north", "south", "west")


class Hospitals:
    """Four witnesses with their own disks."""

    def __init__(self, world: World, folder: Path) -> None:
        self.world = world
        self.folder = folder
        self.keys = {name: MemberKeys.generate(name) for name in NAMES}
        self.tls = {name: world.ca.issue_hospital(name) for name in NAMES}
        for name in NAMES:
            (folder / name).mkdir()

    @property
    def roster(self) -> Roster:
        return as_roster(found(CONSORTIUM, [keys.public() for keys in self.keys.values()]))

    @asynccontextmanager
    async def witness(self, replica: Replica, name: str, *, spot_checks: int = 4) -> AsyncIterator[Witness]:
        """A witness as it is after a start of its node."""
        async with MeshChannel(replica.target, self.tls[name]) as channel:
            memory = SqliteNodeState(self.folder / name).witness
            audit = GrpcAuditLog(channel, 10.0)
            clock = SystemClock()
            yield Witness(audit, memory, self.keys[name], CONSORTIUM, replica.verifier, clock, spot_checks)

    async def look(self, replica: Replica, *names: str, spot_checks: int = 4) -> list[str]:
        outcomes = []
        for name in names or NAMES:
            async with self.witness(replica, name, spot_checks=spot_checks) as witness:
                outcomes.append(await witness.look())
        return outcomes
