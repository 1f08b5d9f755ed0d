"""Which of several servers a connection goes to, without any server."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from services.common import postgres_servers as module
from services.common.postgres_servers import Servers, split


@dataclass
class Made:
    port: str
    closed: bool = False

    async def close(self) -> None:
        self.closed = True


@dataclass
class Fakes:
    """Servers by port: `silent` ones never answer, `away` ones refuse."""

    silent: set[str] = field(default_factory=set)
    away: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    under_way: Counter[str] = field(default_factory=Counter)
    most: int = 0

    async def connect(self, conninfo: str) -> Made:
        port = str(conninfo_to_dict(conninfo)["port"])
        self.asked.append(port)
        self.under_way[port] += 1
        self.most = max(self.most, self.under_way[port])
        try:
            await asyncio.sleep(0)
            if port in self.silent:
                await asyncio.get_running_loop().create_future()
            if port in self.away:
                raise psycopg.OperationalError(f"{port} is away")
        except asyncio.CancelledError:
            self.given_up.append(port)
            raise
        finally:
            self.under_way[port] -= 1
        return Made(port)

    def servers(self, ports: str = "1,2,3") -> Servers[Made]:
        return Servers(f"host=a,b,c port={ports} target_session_attrs=read-write", self.connect)


def test_each_server_has_a_string_of_its_own() -> None:
    told = [conninfo_to_dict(each) for each in split("host=a,b port=1,2 user=u target_session_attrs=read-write")]
    assert [(item["host"], item["port"]) for item in told] == [("a", "1"), ("b", "2")]
    assert all((item["user"], item["target_session_attrs"]) == ("u", "read-write") for item in told)
    assert [conninfo_to_dict(each)["port"] for each in split("host=a,b port=7")] == ["7", "7"]
    assert [conninfo_to_dict(each) for each in split("host=/tmp/socket dbname=d")] == [
        {"host": "/tmp/socket", "dbname": "d"}
    ]
    assert split("dbname=d") == ["dbname=d"]


async def test_a_silent_server_keeps_nobody_from_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BESIDE_S", 0.0)
    fakes = Fakes(silent={"1"}, away={"2"})
    servers = fakes.servers()
    assert (await servers.connect()).port == "3"
    assert (fakes.asked, fakes.given_up) == (["1", "2", "3"], ["1"])
    # The one that answered comes first from now on.
    fakes.asked.clear()
    monkeypatch.setattr(module, "BESIDE_S", 3600.0)
    assert (await servers.connect()).port == "3"
    assert fakes.asked == ["3"]
    # One that refuses is not waited for.
    fakes.away.add("3")
    fakes.silent.clear()
    assert (await servers.connect()).port == "1"


async def test_when_all_refuse_the_last_reason_is_told() -> None:
    fakes = Fakes(away={"1", "2", "3"})
    with pytest.raises(psycopg.OperationalError, match="3 is away"):
        await fakes.servers().connect()
    assert fakes.asked == ["1", "2", "3"]


async def test_a_connection_that_nobody_needs_any_more_is_closed() -> None:
    made: list[Made] = []

    async def connect(conninfo: str) -> Made:
        made.append(Made(str(conninfo_to_dict(conninfo)["port"])))
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            if len(made) < 2:
                raise
        return made[-1]

    servers: Servers[Made] = Servers("host=a port=1", connect)
    first = asyncio.create_task(servers.connect())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    second = asyncio.create_task(servers.connect())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert [item.closed for item in made] == [False, True]


async def test_one_looks_for_a_server_while_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    fakes = Fakes(away={"1", "2", "3"})
    servers = fakes.servers()
    waiting = [asyncio.create_task(servers.await_one()) for _ in range(5)]
    while len(fakes.asked) < 12:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)
    assert fakes.most == 1
    fakes.away.remove("2")
    assert {(await task).port for task in waiting} == {"2"}
    assert fakes.most == 1


async def test_who_looks_waits_for_no_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 0.001)
    fakes = Fakes(away={"1", "2", "3"})
    waiting = asyncio.create_task(fakes.servers().await_one())
    while len(fakes.asked) < 6:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(0)
    fakes.silent.add("1")
    before = len(fakes.asked)
    while fakes.asked[before:].count("2") < 3:  # noqa: ASYNC110
        await asyncio.sleep(0)
    # Once, here or just before.
    assert fakes.asked[before:].count("1") <= 1
    fakes.away.remove("2")
    assert (await waiting).port == "2"
    assert fakes.given_up == ["1"]


async def test_nobody_waits_for_a_server_after_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAUSE_S", 3600.0)
    servers = Fakes(away={"1", "2", "3"}).servers()
    waiting = asyncio.create_task(servers.await_one())
    await asyncio.sleep(0)
    servers.close()
    with pytest.raises(psycopg.OperationalError):
        await waiting
