"""Which hospitals may not call: what the registry says of their standing, known to every service within seconds.

A certificate stays valid after a hospital was suspended or removed. Services other than the registry therefore ask it
every few seconds, and their gate refuses who is barred: new calls at once, streams in the middle. While the registry is
away the last list stands. Before the first list hospitals are told to come again, so that a suspended one cannot slip
in through a restart.
"""

import asyncio
import time
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from prometheus_client import Gauge
from pydantic import Field

from services.common.config import Section
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.identity import Identity, Kind
from services.common.telemetry import get_logger

log = get_logger(__name__)

_TIMEOUT_S: Final = 5.0
_BARRED: Final = {
    registry_pb2.HOSPITAL_STATUS_SUSPENDED: "suspended",
    registry_pb2.HOSPITAL_STATUS_REMOVED: "removed",
}
_HOSPITALS_BARRED = Gauge("fedmesh_standing_barred", "Hospitals that are suspended or removed")
_AGE = Gauge("fedmesh_standing_age_seconds", "Age of the newest list of hospitals from the registry")


class StandingConfig(Section):
    interval_s: float = Field(
        2.0, gt=0, le=10, description="seconds between looks at the registry for suspended and removed hospitals"
    )


class Standing:
    """The last list of barred hospitals. `run` keeps it fresh; `admit` goes into the server's gate."""

    def __init__(self, registry: MeshChannel, config: StandingConfig) -> None:
        self._stub = registry.stub(registry_pb2_grpc.RegistryServiceStub)
        self._interval_s = config.interval_s
        self._barred: Mapping[str, str] | None = None
        self._known_at = time.monotonic()

    def admit(self, caller: Identity) -> None:
        """Let a caller pass, or not. Only hospitals have a standing.

        Raises: FedmeshError(PERMISSION_DENIED) for a suspended or removed hospital, (SERVICE_UNAVAILABLE) for every
            hospital while no list has come yet.
        """
        if caller.kind is not Kind.HOSPITAL:
            return
        if self._barred is None:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the standing of hospitals is not known yet: try again")
        status = self._barred.get(caller.name)
        if status is not None:
            raise FedmeshError(
                Code.PERMISSION_DENIED, f"hospital {caller.name} is {status}: ask the consortium", status=status
            )

    def barred(self, hospital_id: str) -> bool:
        """Whether a hospital is known to be suspended or removed: nobody need wait for it."""
        return self._barred is not None and hospital_id in self._barred

    async def run(self) -> None:
        """Ask until cancelled. A registry that is away ends nothing."""
        while True:
            try:
                await self.refresh()
            except FedmeshError as error:
                log.warning("standing_not_read", code=error.code.value, reason=error.message)
            _AGE.set(time.monotonic() - self._known_at)
            await asyncio.sleep(self._interval_s if self._barred is not None else min(self._interval_s, 0.2))

    async def refresh(self) -> None:
        """Read the list now.

        Raises: FedmeshError, and then the list stays as it was.
        """
        answer = await call(self._stub.ListHospitals, registry_pb2.ListHospitalsRequest(), timeout_s=_TIMEOUT_S)
        barred = {item.hospital_id: _BARRED[item.status] for item in answer.hospitals if item.status in _BARRED}
        if barred != self._barred:
            log.info("standing_changed", barred=barred)
        self._barred = MappingProxyType(barred)
        self._known_at = time.monotonic()
        _HOSPITALS_BARRED.set(len(barred))
