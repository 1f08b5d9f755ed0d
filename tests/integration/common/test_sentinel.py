"""Two real Redis servers, three real Sentinels, and a client that finds the master before and after a failover."""

import asyncio
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from services.common.config import RedisConfig, SentinelConfig
from services.common.errors import Code, FedmeshError
from services.common.redis import Scripts, connect_redis, redis_errors, redis_ready
from services.common.redis_master import follow_master
from services.common.tasks import end_tasks
from services.embedded.processes import free_port, wait_until
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis
USERS = """user default off
user coordinator on >secret ~* &* +@all
"""


class Watched:
    """A master, its replica, and who watches them; all sign in as `coordinator`."""

    def __init__(self, folder: Path, program: Path) -> None:
        self.folder = folder
        self.program = program
        self.ports: dict[str, int] = {}
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "users.acl").write_text(USERS)
        for name in ("first", "second"):
            self.start(name, ["masteruser coordinator", "masterauth secret", "save ''", "repl-diskless-sync-delay 0"])
        with self.client("second") as second:
            second.replicaof("127.0.0.1", self.ports["first"])
        assert wait_until(lambda: self.info("second").get("master_link_status") == "up", 30)
        for name in ("s1", "s2", "s3"):
            self.start(
                name,
                [
                    f"sentinel monitor fedmesh 127.0.0.1 {self.ports['first']} 2",
                    "sentinel auth-user fedmesh coordinator",
                    "sentinel auth-pass fedmesh secret",
                    "sentinel sentinel-user coordinator",
                    "sentinel sentinel-pass secret",
                    "sentinel down-after-milliseconds fedmesh 5000",
                    "sentinel failover-timeout fedmesh 3000",
                ],
                ["--sentinel"],
            )
        # They find each other and the replica through the master.
        assert wait_until(lambda: all(self.knows(name) for name in ("s1", "s2", "s3")), 60)

    def start(self, name: str, lines: list[str], arguments: list[str] | None = None) -> None:
        """Start a server on a port of its own; on another one when somebody else was quicker to take it."""
        log = self.folder / f"{name}.log"
        for _ in range(5):
            self.ports[name] = free_port()
            common = ["bind 127.0.0.1", f"port {self.ports[name]}", f"dir {self.folder}"]
            file = self.folder / f"{name}.conf"
            file.write_text("\n".join([*common, f"aclfile {self.folder}/users.acl", *lines]) + "\n")
            with log.open("wb") as output:
                command = [str(self.program), str(file), *(arguments or [])]
                child = self.running[name] = subprocess.Popen(command, stdout=output, stderr=output)
            if wait_until(lambda: self.info(name) != {} or child.poll() is not None, 30) and child.poll() is None:  # noqa: B023
                return
            assert "Address already in use" in log.read_text(), log.read_text()
        raise AssertionError("no port stayed free")

    def client(self, name: str) -> redis.Redis:
        return redis.Redis(port=self.ports[name], username="coordinator", password="secret", socket_timeout=5)

    def info(self, name: str) -> dict[str, object]:
        with self.client(name) as client:
            try:
                return dict(client.info())
            except redis.RedisError:
                return {}

    def knows(self, name: str) -> bool:
        master = self.info(name).get("master0")
        return isinstance(master, dict) and (master["slaves"], master["sentinels"], master["status"]) == (1, 3, "ok")

    def config(self) -> RedisConfig:
        password = self.folder / "password"
        password.write_text("secret")
        password.chmod(0o600)
        gone = f"127.0.0.1:{free_port()}"
        addresses = (gone, *(f"127.0.0.1:{self.ports[name]}" for name in ("s1", "s2", "s3")))
        sentinel = SentinelConfig(addresses=addresses)
        return RedisConfig(url="redis://nowhere:1/0", username="coordinator", password_file=password, sentinel=sentinel)

    def stop(self) -> None:
        for child in self.running.values():
            child.kill()
            child.wait()


@pytest.fixture
def watched(tmp_path: Path, redis_program: Path) -> Iterator[Watched]:
    made = Watched.__new__(Watched)
    made.running = {}
    try:
        made.__init__(tmp_path, redis_program)  # type: ignore[misc]  # what was started is stopped whatever happens
        yield made
    finally:
        made.stop()


async def test_a_client_follows_the_master(watched: Watched) -> None:
    client = connect_redis(watched.config())
    try:
        assert await redis_ready(client)
        await client.set("coordinator:x", 1)
        assert watched.info("first")["role"] == "master"
        with watched.client("second") as second:
            assert wait_until(lambda: second.get("coordinator:x") == b"1", 10)
        watched.running["first"].send_signal(signal.SIGKILL)
        watched.running["first"].wait()
        assert await asyncio.to_thread(wait_until, lambda: watched.info("second").get("role") == "master", 60)
        async with asyncio.timeout(30):
            while not await redis_ready(client):  # noqa: ASYNC110 - the server tells, no event does
                await asyncio.sleep(0.1)
        await client.set("coordinator:x", 2)
        assert await client.get("coordinator:x") == b"2"
        with watched.client("second") as second:
            assert second.get("coordinator:x") == b"2"
    finally:
        await client.aclose()


async def test_a_master_that_froze_is_left_before_it_comes_back(watched: Watched) -> None:
    client = connect_redis(watched.config())
    following = asyncio.create_task(follow_master(client))
    try:
        # One connection that waits, and one that does nothing.
        subscription = client.pubsub()
        await subscription.subscribe("coordinator:x")
        await client.set("coordinator:x", 1)
        waiting = subscription.connection
        assert waiting is not None
        held = [waiting, *client.connection_pool._available_connections]
        assert [item.port for item in held] == [watched.ports["first"]] * 2
        with watched.client("second") as second:
            assert wait_until(lambda: second.get("coordinator:x") == b"1", 10)
        watched.running["first"].send_signal(signal.SIGSTOP)
        async with asyncio.timeout(60):
            while any(item.is_connected and item.port == watched.ports["first"] for item in held):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        assert watched.info("second")["role"] == "master"
        watched.running["first"].send_signal(signal.SIGCONT)
        await client.set("coordinator:x", 2)
        with watched.client("second") as second:
            assert second.get("coordinator:x") == b"2"
    finally:
        await end_tasks([following])
        await client.aclose()


async def test_without_sentinels_there_is_no_master_to_leave(redis_server: RedisServer) -> None:
    client = connect_redis(redis_server.config("coordinator"))
    following = asyncio.create_task(follow_master(client))
    try:
        await client.set("coordinator:x", 1)
        assert not following.done()
        assert all(item.is_connected for item in client.connection_pool._available_connections)
    finally:
        await end_tasks([following])
        await client.aclose()


@pytest.mark.parametrize(
    "error",
    [
        # redis-py's `ensure_connection`: its parser says so, and nothing there catches it.
        OSError("Buffer is closed."),
        RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
    ],
)
async def test_a_connection_that_closes_meanwhile_is_a_store_that_is_away(
    error: Exception, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = connect_redis(redis_server.config("coordinator"))
    try:
        assert await redis_ready(client)

        async def closes(*_arguments: object, **_options: object) -> None:
            raise error

        monkeypatch.setattr(client, "execute_command", closes)
        assert not await redis_ready(client)
    finally:
        await client.aclose()
    with pytest.raises(FedmeshError) as caught:
        async with redis_errors():
            raise error
    assert caught.value.code is Code.STORE_UNAVAILABLE


async def test_other_errors_are_not_the_stores() -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        async with redis_errors():
            raise RuntimeError("a mistake")


async def test_a_script_on_a_server_that_is_no_master_any_more_is_to_be_tried_again(
    redis_server: RedisServer, tmp_path: Path
) -> None:
    (tmp_path / "put.lua").write_text("return redis.call('SET', KEYS[1], ARGV[1])")
    client = connect_redis(redis_server.config("coordinator"))
    scripts = Scripts(client, tmp_path)
    try:
        with redis_server.client() as admin:
            await scripts.run("put", ["coordinator:x"], [1])
            held = list(client.connection_pool._available_connections)
            admin.replicaof("127.0.0.1", str(free_port()))
            try:
                with pytest.raises(FedmeshError) as caught:
                    await scripts.run("put", ["coordinator:x"], [2])
            finally:
                admin.replicaof("NO", "ONE")
        assert caught.value.code is Code.STORE_UNAVAILABLE
        # Nothing that leads there is kept.
        assert held
        assert not any(connection.is_connected for connection in held)
        await scripts.run("put", ["coordinator:x"], [3])
        assert await client.get("coordinator:x") == b"3"
    finally:
        await client.aclose()


async def test_no_sentinel_and_no_master_are_a_store_that_is_away(tmp_path: Path) -> None:
    nobody = SentinelConfig(addresses=(f"127.0.0.1:{free_port()}",))
    client = connect_redis(RedisConfig(url="redis://nowhere:1/0", username="coordinator", sentinel=nobody))
    try:
        assert not await redis_ready(client)
        with pytest.raises(FedmeshError) as caught:
            async with redis_errors():
                await client.get("coordinator:x")
        assert caught.value.code is Code.STORE_UNAVAILABLE
    finally:
        await client.aclose()
