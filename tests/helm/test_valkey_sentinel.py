"""Three Valkeys with Sentinels by the chart's own script: they find each other, fail over, and come back.

Played without TLS, which the Redis of PyPI lacks; that the pods use it is asked of the rendered objects.
"""

import asyncio
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import redis

from services.common.config import RedisConfig, SentinelConfig
from services.common.redis import connect_redis, redis_ready
from services.embedded.processes import free_port
from tests.support.charts import CENTRE, named, render, values_of
from tests.support.played import Cluster, played, wait

VALUES = values_of(CENTRE / "values-kind.yaml", valkey={"mode": "sentinel"})


class Trio:
    """The three pods. Everybody is `localhost`, on ports of their own. settings: environment of the script."""

    def __init__(self, cluster: Cluster, settings: dict[str, str]) -> None:
        self.cluster = cluster
        self.settings = settings
        self.ports = [free_port() for _ in range(3)]
        self.watchers = [free_port() for _ in range(3)]
        self.mounted: dict[int, tuple[list[str], dict[str, Any]]] = {}

    def command(self, number: int) -> tuple[list[str], dict[str, Any]]:
        """How to run the script in a pod, whose files are laid out once."""
        if number not in self.mounted:
            self.mounted[number] = self._mount(number)
        return self.mounted[number]

    def _mount(self, number: int) -> tuple[list[str], dict[str, Any]]:
        settings = {
            "PORT": str(self.ports[number]),
            "SENTINEL_PORT": str(self.watchers[number]),
            "ME": "localhost",
            "FIRST": f"localhost:{self.ports[0]}",
            "SENTINELS": " ".join(f"localhost:{port}" for port in self.watchers),
            "DOWN_AFTER_MS": "5000",
            "FAILOVER_MS": "3000",
        }
        return self.cluster.store_command("valkey", f"pod-{number}", settings | self.settings)

    def start(self, number: int) -> None:
        argv, options = self.command(number)
        for role in ("sentinel", "run"):
            self.cluster.start(f"pod-{number}-{role}", [*argv, role], **options)

    def says(self, number: int, question: str) -> bool:
        """What a probe of the pod finds."""
        argv, options = self.command(number)
        return subprocess.run([*argv, question], check=False, capture_output=True, **options).returncode == 0

    def wait_ready(self) -> None:
        for number in range(3):
            for question in ("sentinel-ready", "sentinel-alive", "ready"):
                wait(partial(self.says, number, question))

    def kill(self, number: int) -> None:
        for role in ("sentinel", "run"):
            child = self.cluster.running[f"pod-{number}-{role}"]
            child.kill()
            child.wait()

    def password(self, user: str) -> str:
        return self.cluster.secrets.content[f"fedmesh-valkey-{user}"]["password"].decode()

    def ask(self, port: int, section: str) -> dict[str, Any]:
        """What INFO says on a port; nothing when nobody is there."""
        with redis.Redis("localhost", port, username="admin", password=self.password("admin"), **self.tls()) as client:
            try:
                return dict(client.info(section))
            except redis.RedisError:
                return {}

    def tls(self) -> dict[str, Any]:
        return {}

    def settled(self) -> bool:
        """One master with two replicas in step, and three Sentinels that see just that."""
        roles = [self.ask(port, "replication") for port in self.ports]
        masters = [item for item in roles if item.get("role") == "master"]
        in_step = [item for item in roles if item.get("master_link_status") == "up"]
        seen = [self.ask(port, "sentinel").get("master0", {}) for port in self.watchers]
        agreed = {(item.get("status"), item.get("slaves"), item.get("sentinels")) for item in seen}
        return len(masters) == 1 and len(in_step) == 2 and agreed == {("ok", 2, 3)}

    def master(self) -> int:
        """Number of the pod whose server is the master."""
        (found,) = [n for n, port in enumerate(self.ports) if self.ask(port, "replication").get("role") == "master"]
        return found

    @asynccontextmanager
    async def client(self, url: str = "redis://localhost:1/0") -> AsyncIterator[Any]:
        """The client of a service."""
        file = self.cluster.folder / "coordinator"
        file.write_text(self.password("coordinator"))
        file.chmod(0o600)
        sentinel = SentinelConfig(addresses=tuple(f"localhost:{port}" for port in self.watchers))
        opened = connect_redis(RedisConfig(url=url, username="coordinator", password_file=file, sentinel=sentinel))
        try:
            yield opened
        finally:
            await opened.aclose()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with played(render(CENTRE, VALUES)) as made:
        made.make_secrets()
        yield made


async def fail_over_and_come_back(trio: Trio, url: str) -> None:
    """Two failovers in a row: the second needs the pod that was lost in the first."""
    for number in range(3):
        trio.start(number)
    await asyncio.to_thread(trio.wait_ready)
    async with trio.client(url) as client:
        for turn in range(2):
            await asyncio.to_thread(wait, trio.settled)
            await client.set("coordinator:turn", turn)
            assert await client.wait(2, 5000) == 2
            lost = trio.master()
            trio.kill(lost)
            async with asyncio.timeout(60):
                while not await redis_ready(client):  # noqa: ASYNC110 - the servers tell, no event does
                    await asyncio.sleep(0.1)
            assert await client.get("coordinator:turn") == str(turn).encode()
            assert trio.master() != lost
            trio.start(lost)
        await asyncio.to_thread(wait, trio.settled)


async def test_they_elect_another_master_and_take_the_lost_one_back(cluster: Cluster) -> None:
    await fail_over_and_come_back(Trio(cluster, {"TLS": ""}), "redis://localhost:1/0")


def test_a_server_that_says_nothing_holds_nobody_up(cluster: Cluster) -> None:
    """Such as one whose machine is gone: its address is known for as long as Kubernetes cannot tell."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        argv, options = cluster.store_command("valkey", settings={"TLS": "", "PORT": str(silent.getsockname()[1])})
        done = subprocess.run([*argv, "ready"], check=False, capture_output=True, timeout=30, **options)
    assert done.returncode != 0


def test_the_pods_of_the_chart_speak_tls_only() -> None:
    spec = named(render(CENTRE, VALUES), "StatefulSet", "fedmesh-valkey")["spec"]["template"]["spec"]
    assert [item["name"] for item in spec["containers"]] == ["valkey", "sentinel"]
    for container in spec["containers"]:
        assert {"name": "TLS", "value": "yes"} in container["env"]
        assert "/etc/fedmesh/tls" in [mount["mountPath"] for mount in container["volumeMounts"]]
