"""What a list of hospitals lets in, and for how long it counts."""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest

from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import Peer
from services.common.identity import Identity, Kind
from services.common.standing import Member, Standing, StandingConfig

AT = datetime(2026, 1, 1, tzinfo=UTC)


class Registry:
    """Lists what it was told; away when that is None."""

    def __init__(self, *members: Member) -> None:
        self.members: Sequence[Member] | None = members

    async def __call__(self) -> Sequence[Member]:
        if self.members is None:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "away")
        return self.members


class Seconds:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def peer(name: str, kind: Kind = Kind.HOSPITAL, since: datetime = AT) -> Peer:
    return Peer(Identity("c.local", kind, name), since)


def refusal(standing: Standing, who: Peer) -> Code:
    with pytest.raises(FedmeshError) as caught:
        standing.admit(who)
    return caught.value.code


def test_barred_hospitals_and_revoked_certificates_stay_out() -> None:
    registry = Registry(Member("north"), Member("south", "suspended"), Member("west", "", AT + timedelta(seconds=1)))
    standing = Standing(registry, StandingConfig())
    assert refusal(standing, peer("north")) is Code.SERVICE_UNAVAILABLE, "nobody, before the first list"
    standing.admit(peer("registry", Kind.SERVICE))
    asyncio.run(standing.refresh())
    standing.admit(peer("north"))
    standing.admit(peer("west", since=AT + timedelta(seconds=1)))
    assert refusal(standing, peer("south")) is Code.PERMISSION_DENIED
    assert refusal(standing, peer("west")) is Code.PERMISSION_DENIED
    # The registry itself looks at the status with every call, and at certificates here.
    standing.admit_certificate(peer("south"))
    with pytest.raises(FedmeshError, match="revoked"):
        standing.admit_certificate(peer("west"))


def test_an_old_list_counts_for_nothing() -> None:
    registry, seconds = Registry(Member("north")), Seconds()
    standing = Standing(registry, StandingConfig(max_age_s=60), seconds)
    asyncio.run(standing.refresh())
    registry.members = None
    seconds.now += 60
    with pytest.raises(FedmeshError):
        asyncio.run(standing.refresh())
    standing.admit(peer("north"))
    seconds.now += 0.1
    assert refusal(standing, peer("north")) is Code.SERVICE_UNAVAILABLE
    standing.admit(peer("alice", Kind.OPERATOR))
    registry.members = [Member("north")]
    asyncio.run(standing.refresh())
    standing.admit(peer("north"))
