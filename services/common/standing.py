"""Which hospitals may not call, and which of their certificates: what the registry says, known everywhere in seconds.

A certificate stays valid after a hospital was suspended or removed, or got a new one in its place. Services therefore
ask the registry every few seconds, and their gate refuses who is barred: new calls at once, streams in the middle.
While the registry is away the last list stands, but not for ever: older than `max_age_s` it counts for nothing, and
hospitals are told to come again, as before the first list. A suspended one can so neither slip in through a restart nor
wait behind a cut line.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Final

from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from prometheus_client import Gauge
from pydantic import Field

from services.common.config import Section
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.common.grpc.gate import Peer
from services.common.identity import Kind
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
    max_age_s: float = Field(
        60.0,
        ge=10,
        le=3600,
        description="seconds for which the last look counts while the registry is away; then no hospital is let in",
    )


@dataclass(frozen=True)
class Member:
    """A hospital as the registry knows it.

    barred: `suspended`, `removed`, or empty. certificates_from: certificates that begin before are revoked.
    """

    hospital_id: str
    barred: str = ""
    certificates_from: datetime | None = None


Source = Callable[[], Awaitable[Sequence[Member]]]
"""Reads all hospitals. Raises FedmeshError."""


def registry_members(registry: MeshChannel) -> Source:
    """The hospitals as the registry lists them to other services."""
    stub = registry.stub(registry_pb2_grpc.RegistryServiceStub)

    async def read() -> Sequence[Member]:
        answer = await call(stub.ListHospitals, registry_pb2.ListHospitalsRequest(), timeout_s=_TIMEOUT_S)
        return [
            Member(
                item.hospital_id,
                _BARRED.get(item.status, ""),
                item.certificates_from.ToDatetime(tzinfo=UTC) if item.HasField("certificates_from") else None,
            )
            for item in answer.hospitals
        ]

    return read


class Standing:
    """The last list of hospitals. `run` keeps it fresh; `admit` goes into the server's gate."""

    def __init__(self, source: Source, config: StandingConfig, now: Callable[[], float] = time.monotonic) -> None:
        self._source = source
        self._config = config
        self._now = now
        self._barred: Mapping[str, str] | None = None
        self._since: Mapping[str, datetime] = {}
        self._known_at = now()

    def admit(self, peer: Peer) -> None:
        """Let a caller pass, or not. Only hospitals have a standing.

        Raises: FedmeshError(PERMISSION_DENIED) for a suspended or removed hospital and for a revoked certificate,
            (SERVICE_UNAVAILABLE) for every hospital while no list has come yet, or none for too long.
        """
        if peer.identity.kind is not Kind.HOSPITAL:
            return
        self.admit_certificate(peer)
        name = peer.identity.name
        status = self._barred.get(name) if self._barred is not None else None
        if status is not None:
            raise FedmeshError(
                Code.PERMISSION_DENIED, f"hospital {name} is {status}: ask the consortium", status=status
            )

    def admit_certificate(self, peer: Peer) -> None:
        """As `admit`, for a service that knows better than the list who is suspended."""
        if peer.identity.kind is not Kind.HOSPITAL:
            return
        if self._barred is None or self._now() - self._known_at > self._config.max_age_s:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the standing of hospitals is not known now: try again")
        since = self._since.get(peer.identity.name)
        if since is not None and peer.certified_from < since:
            raise FedmeshError(
                Code.PERMISSION_DENIED,
                f"this certificate of hospital {peer.identity.name} is revoked: use the newest, or ask the consortium"
                " for an invitation",
                status="revoked",
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
            _AGE.set(self._now() - self._known_at)
            interval_s = self._config.interval_s
            await asyncio.sleep(interval_s if self._barred is not None else min(interval_s, 0.2))

    async def refresh(self) -> None:
        """Read the list now.

        Raises: FedmeshError, and then the list stays as it was.
        """
        asked_at = self._now()
        members = await self._source()
        barred = {item.hospital_id: item.barred for item in members if item.barred}
        if barred != self._barred:
            log.info("standing_changed", barred=barred)
        self._barred = MappingProxyType(barred)
        self._since = {item.hospital_id: item.certificates_from for item in members if item.certificates_from}
        self._known_at = asked_at
        _HOSPITALS_BARRED.set(len(barred))
