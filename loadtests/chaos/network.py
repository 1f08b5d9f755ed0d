"""The process of all proxies and of the name server: `python -m loadtests.chaos.network --config FILE`.

Its control socket (Unix, one JSON object a line, one reply a line) takes `{"rules": [...]}`, the whole new set, and
`{"act": "reset" | "half_open" | "drop", "target": NAME, "share": PART}` for connections that are there.
"""

import argparse
import asyncio
import json
import os
import signal
import socket
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import uvloop

from loadtests.chaos.names import NameServer
from loadtests.chaos.proxy import Connection, Proxy
from loadtests.chaos.rules import Line, Rule, line

_MOMENT_S: Final = 0.1
_ESTABLISHED: Final = "01"
_ACTS: Final = ("reset", "half_open", "drop")


def sockets_of(pids: Iterable[int]) -> dict[str, int]:
    """Inodes of the sockets that processes hold, with the process."""
    found = {}
    for pid in pids:
        with suppress(OSError):
            for handle in os.scandir(f"/proc/{pid}/fd"):
                with suppress(OSError):
                    target = os.readlink(handle.path)
                    if target.startswith("socket:["):
                        found[target[8:-1]] = pid
    return found


def owners(pids: Iterable[int]) -> dict[tuple[str, int], int]:
    """The pid behind each local end (IPv4 address, port) of TCP connections of these processes (proc_net_tcp(5))."""
    inodes = sockets_of(pids)
    found = {}
    for table in ("tcp", "tcp6"):
        for row in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = row.split()
            if fields[3] == _ESTABLISHED and fields[9] in inodes:
                host, port = fields[1].split(":")
                # gRPC reaches IPv4 by IPv6 sockets: the last word is the address.
                found[(socket.inet_ntoa(bytes.fromhex(host[-8:])[::-1]), int(port, 16))] = inodes[fields[9]]
    return found


class Network:
    """All proxies of a run and the rules in force."""

    def __init__(self) -> None:
        self._rules: list[Rule] = []
        self._finding: asyncio.TimerHandle | None = None
        self._proxies: dict[str, Proxy] = {}

    async def start(self, links: Iterable[dict[str, Any]]) -> None:
        """links: `name`, `host`, `port` to listen at and `to_host`, `to_port` behind it."""
        for link in links:
            proxy = Proxy(link["name"], (link["to_host"], link["to_port"]), self._look)
            await proxy.start(link["host"], link["port"])
            self._proxies[link["name"]] = proxy

    async def stop(self) -> None:
        for proxy in self._proxies.values():
            await proxy.stop()

    def _look(self, connection: Connection, target: str) -> Line:
        by_source = any(rule.sources and rule.target in ("", target) for rule in self._rules)
        if by_source and not connection.looked_up:
            # Whose it is takes a look at all processes: one for all connections that begin within a moment.
            if self._finding is None:
                self._finding = asyncio.get_running_loop().call_later(_MOMENT_S, self._find_owners)
            return Line(cut=True)
        return line(self._rules, target, connection.pid)

    def _find_owners(self) -> None:
        self._finding = None
        found = owners({pid for rule in self._rules for pid in rule.sources})
        for proxy in self._proxies.values():
            for connection in proxy.connections:
                if not connection.looked_up:
                    connection.pid, connection.looked_up = found.get(connection.peer), True
            proxy.refresh()

    def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        """Raises: KeyError, TypeError or ValueError for an order that is none."""
        if "rules" in order:
            self._rules = [Rule.parse(raw) for raw in order["rules"]]
            for proxy in self._proxies.values():
                for connection in proxy.connections:
                    connection.looked_up = False
            self._find_owners()
            return {"rules": len(self._rules)}
        if order["act"] not in _ACTS:
            raise ValueError(f"{order['act']} is none of {', '.join(_ACTS)}")
        touched = 0
        for proxy in self._proxies.values():
            if order["target"] in ("", proxy.name):
                for connection in list(proxy.connections):
                    if proxy.chance.random() < order.get("share", 1.0):
                        getattr(connection, order["act"])()
                        touched += 1
        return {"connections": touched}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One controlling connection."""
        while row := await reader.readline():
            try:
                reply = self.obey(json.loads(row))
            except (KeyError, TypeError, ValueError) as error:
                reply = {"error": repr(error)}
            writer.write(json.dumps(reply).encode() + b"\n")
            await writer.drain()
        writer.close()


async def run(config: dict[str, Any]) -> None:
    """Serve until SIGTERM. config: `links`, `names` (addresses by name), `names_port`, `control` (socket path)."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    network = Network()
    await network.start(config["links"])
    await loop.create_datagram_endpoint(lambda: NameServer(config["names"]), ("127.0.0.1", config["names_port"]))
    control = await asyncio.start_unix_server(network.serve, config["control"])
    async with control:
        await stop.wait()


class Control:
    """The other end of the control socket; blocking, to be used from one thread."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def set_rules(self, rules: Iterable[Rule]) -> None:
        self._tell({"rules": [rule.wire() for rule in rules]})

    def act(self, act: str, target: str = "", share: float = 1.0) -> int:
        """How many connections it was done to."""
        return int(self._tell({"act": act, "target": target, "share": share})["connections"])

    def _tell(self, order: dict[str, Any]) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX) as control:
            control.settimeout(30)
            control.connect(str(self._path))
            control.sendall(json.dumps(order).encode() + b"\n")
            reply: dict[str, Any] = json.loads(control.makefile().readline())
        if "error" in reply:
            raise ValueError(f"the network's process says {reply['error']}")
        return reply


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    uvloop.run(run(json.loads(parser.parse_args().config.read_text())))
