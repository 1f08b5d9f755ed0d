"""Two replicas behind one name; one falls silent with its connections open, as when it is frozen."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel
from tests.support.replicas import Replicas, running_replicas


@pytest.fixture
async def replicas(tmp_path: Path) -> AsyncIterator[Replicas]:
    async with running_replicas(tmp_path, 2) as running:
        yield running


def second_tries() -> float:
    return REGISTRY.get_sample_value("fedmesh_grpc_client_second_tries_total") or 0.0


async def test_calls_go_around_a_replica_that_falls_silent(replicas: Replicas) -> None:
    async with MeshChannel(replicas.target, replicas.ca.issue_hospital("h-1")) as channel:
        await replicas.all_answer(channel)
        silent, awake = replicas.audits
        silent.cut(True)
        before = second_tries()
        # No patience: without second tries every other call would end by its deadline.
        assert [await replicas.ask(channel) for _ in range(60)] == [awake.host] * 60
        # And only few of them need one: then the channel has new connections, of which the silent replica is none.
        assert 2 <= second_tries() - before <= 10
        silent.cut(False)
        await replicas.all_answer(channel)


async def test_a_call_that_may_take_long_is_made_once(replicas: Replicas) -> None:
    """It is not for the client to say that a long computation takes too long."""
    async with (
        MeshChannel(replicas.target, replicas.ca.issue_hospital("h-1")) as channel,
        MeshChannel(replicas.target, replicas.ca.issue_operator("olga")) as other,
    ):
        await replicas.all_answer(channel)
        await replicas.all_answer(other)
        for audit in replicas.audits:
            audit.running.clear()
            audit.calls.clear()
        asked = asyncio.ensure_future(replicas.ask(channel, timeout_s=60))
        with pytest.raises(FedmeshError) as caught:
            await replicas.ask(other, timeout_s=2)
        assert caught.value.code is Code.DEADLINE_EXCEEDED
        made = replicas.audits[0].calls + replicas.audits[1].calls
        # The ordinary call shows that there was time for second tries.
        assert made["olga"] > 1
        assert made["h-1"] == 1
        asked.cancel()
        with suppress(asyncio.CancelledError):
            await asked
