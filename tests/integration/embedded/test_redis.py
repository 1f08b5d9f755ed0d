import os
import shutil
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from services.common.errors import Code, FedmeshError
from services.embedded import accounts, processes
from services.embedded.guard import Guard
from services.embedded.redis import EmbeddedRedis
from tests.support.stores import RedisServer

pytestmark = pytest.mark.every_redis
DEFAULT = {"username": "default", "password": ""}


@pytest.fixture
def own(tmp_path: Path, redis_program: Path, store_guard: Guard) -> Iterator[EmbeddedRedis]:
    server = EmbeddedRedis(tmp_path / "redis", program=redis_program, guard=store_guard)
    yield server
    server.destroy()


def test_data_outlives_restarts_and_crashes(own: EmbeddedRedis) -> None:
    own.start()
    with own.client("coordinator") as client:
        client.set("coordinator:kept", 42)
    own.stop()
    own.stop()
    assert not own.status().running
    own.start()
    own.start()
    with own.client("coordinator") as client:
        assert client.get("coordinator:kept") == b"42"
        client.incr("coordinator:kept")
    own.kill()
    own.start()
    with own.client("coordinator") as client:
        assert client.get("coordinator:kept") == b"43"


def test_a_restart_keeps_what_scripts_and_transactions_wrote(own: EmbeddedRedis) -> None:
    """Redis 7 replays them with the rights of its default user, as whom nobody can sign in."""
    own.start()
    with own.client("coordinator") as client:
        client.eval("redis.call('SET', KEYS[1], 1) redis.call('SET', KEYS[2], 2)", 2, "coordinator:a", "coordinator:b")
        with client.pipeline(transaction=True) as transaction:
            transaction.set("coordinator:c", 3).pexpire("coordinator:c", 600_000).execute()
    own.stop()
    own.start()
    with own.client("coordinator") as client:
        assert client.mget("coordinator:a", "coordinator:b", "coordinator:c") == [b"1", b"2", b"3"]


def test_another_process_finds_and_stops_the_server_even_when_its_record_is_lost(own: EmbeddedRedis) -> None:
    own.start()
    pid = own.status().pid
    own._save_state(pid=1, mark="lost")
    other = EmbeddedRedis(own.data_dir)
    assert other.status().pid == pid
    other.stop()
    assert not own.status().running


def test_socket_and_tcp_take_passwords_only(tmp_path: Path, redis_program: Path, store_guard: Guard) -> None:
    server = EmbeddedRedis(
        tmp_path / "redis", program=redis_program, port=processes.free_port(), durable=False, guard=store_guard
    )
    try:
        server.start()
        for tcp in (False, True):
            with redis.Redis.from_url(server.url("coordinator", tcp=tcp)) as client:
                assert client.ping()
            config = server.config("aggregator", tcp=tcp)
            with redis.Redis.from_url(
                config.url, username=config.username, password=server.password("aggregator")
            ) as client:
                assert client.ping()
            for sign_in in ({}, DEFAULT, {"username": "coordinator", "password": "wrong"}, {"password": "x"}):
                client = redis.Redis.from_url(config.url, **sign_in)
                with client, pytest.raises((redis.AuthenticationError, redis.ResponseError)):
                    client.ping()
    finally:
        server.destroy()


def test_secrets_are_private_and_never_shown(own: EmbeddedRedis) -> None:
    own.start()
    secrets = own.data_dir / "secrets"
    assert stat.S_IMODE(secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in secrets.iterdir()} == {0o600}
    pid = own.status().pid
    acl = (own.data_dir / "data" / "users.acl").read_text()
    shown = Path(f"/proc/{pid}/cmdline").read_text() + own.log.read_text() + acl
    assert not [user for user in ("admin", "coordinator", "aggregator") if own.password(user) in shown]


Command = Callable[["redis.Redis"], object]


@pytest.mark.parametrize(
    "command",
    [
        lambda c: c.set("coordinator:a", 1, ex=60),
        lambda c: c.eval("redis.call('SET', KEYS[1], 1); return redis.call('TIME')", 1, "coordinator:a"),
        lambda c: c.register_script("return redis.call('GET', KEYS[1])")(keys=["coordinator:a"]),
        lambda c: c.pipeline().hset("coordinator:h", "f", "v").expire("coordinator:h", 5).execute(),
        lambda c: c.zadd("coordinator:z", {"a": 1}),
        lambda c: c.xadd("coordinator:s", {"a": 1}),
        lambda c: c.publish("coordinator:events", "x"),
        lambda c: c.delete("coordinator:a"),
    ],
)
def test_a_service_works_on_its_own_keys(redis_server: RedisServer, command: Command) -> None:
    with redis_server.client("coordinator") as client:
        command(client)


@pytest.mark.parametrize(
    "command",
    [
        lambda c: c.get("aggregator:secret"),
        lambda c: c.set("aggregator:secret", 1),
        lambda c: c.get("plain"),
        lambda c: c.delete("aggregator:secret"),
        lambda c: c.rename("coordinator:mine", "aggregator:secret"),
        lambda c: c.mget("coordinator:mine", "aggregator:secret"),
        lambda c: c.eval("return redis.call('GET', KEYS[1])", 1, "aggregator:secret"),
        lambda c: c.eval("return redis.call('GET', 'aggregator:secret')", 0),
        lambda c: c.eval("return redis.call('FLUSHALL')", 0),
        lambda c: c.publish("aggregator:events", "x"),
        lambda c: c.scan(),
        lambda c: c.keys("*"),
        lambda c: c.randomkey(),
        lambda c: c.dbsize(),
        lambda c: c.pubsub_channels(),
        lambda c: c.flushdb(),
        lambda c: c.flushall(),
        lambda c: c.config_get("*"),
        lambda c: c.acl_list(),
        lambda c: c.client_list(),
        lambda c: c.script_flush(),
        lambda c: c.monitor().__enter__(),
        lambda c: c.execute_command("DEBUG", "SLEEP", "0"),
        lambda c: c.execute_command("SHUTDOWN"),
        lambda c: c.execute_command("MIGRATE", "127.0.0.1", "1", "coordinator:mine", "0", "1"),
    ],
)
def test_a_service_reaches_nothing_else(redis_server: RedisServer, command: Command) -> None:
    with redis_server.client() as admin:
        admin.set("aggregator:secret", 7)
        admin.set("coordinator:mine", 7)
        with (
            redis_server.client("coordinator") as client,
            pytest.raises(redis.ResponseError, match=r"(?i)permission|access|can't run|not allowed"),
        ):
            command(client)
        assert admin.get("aggregator:secret") == b"7"


def test_the_aggregator_cannot_read_the_coordinator(redis_server: RedisServer) -> None:
    with redis_server.client() as admin, redis_server.client("aggregator") as client:
        admin.set("coordinator:secret", 7)
        client.set("aggregator:mine", 1)
        with pytest.raises(redis.exceptions.NoPermissionError):
            client.get("coordinator:secret")


def test_every_test_gets_an_empty_running_server(redis_server: RedisServer) -> None:
    with redis_server.client() as admin:
        assert admin.dbsize() == 0
        redis_server.stop()
        with pytest.raises(redis.ConnectionError):
            admin.ping()
        redis_server.start()
        assert admin.ping()


def fill(client: redis.Redis) -> None:
    for number in range(100):
        client.set(f"aggregator:{number}", b"x" * 100_000)


def test_memory_is_bounded_without_evicting(tmp_path: Path, redis_program: Path, store_guard: Guard) -> None:
    server = EmbeddedRedis(tmp_path / "redis", program=redis_program, max_memory_mb=3, durable=False, guard=store_guard)
    try:
        server.start()
        with server.client("aggregator") as client:
            client.set("aggregator:first", 1)
            with pytest.raises(redis.exceptions.OutOfMemoryError):
                fill(client)
            assert client.get("aggregator:first") == b"1"
    finally:
        server.destroy()


# ---- refusals


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(FedmeshError, match=str(port)) as caught:
            EmbeddedRedis(tmp_path / "redis", port=port).start()
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_program_that_is_no_redis_is_named(tmp_path: Path) -> None:
    with pytest.raises(FedmeshError, match="not a Redis server") as caught:
        EmbeddedRedis(tmp_path / "redis", program=Path("/bin/echo")).start()
    assert caught.value.code is Code.CONFIG_INVALID


def test_a_full_disk_is_named(tmp_path: Path, redis_program: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(tmp_path)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a small file system here")
    server = EmbeddedRedis(tmp_path / "redis", program=redis_program)
    try:
        with pytest.raises(OSError, match="space"):
            (tmp_path / "ballast").write_bytes(b"x" * 2**21)
        with pytest.raises(FedmeshError) as caught:
            server.start()
        assert caught.value.code is Code.STORE_FULL
        assert not server.status().running
    finally:
        server.destroy()
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="a normal user's programs are always in reach")
def test_root_may_install_where_only_root_may_enter(
    tmp_path: Path, redis_program: Path, store_guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Path(tempfile.mkdtemp())
    monkeypatch.setattr(accounts, "CACHE_ROOT", cache)
    program = Path(shutil.copy2(redis_program, tmp_path / "redis-server"))
    server = EmbeddedRedis(tmp_path / "redis", program=program, durable=False, guard=store_guard)
    try:
        server.start()
        assert os.stat(f"/proc/{server.status().pid}").st_uid == accounts.store_account().uid
    finally:
        server.destroy()
        shutil.rmtree(cache)
