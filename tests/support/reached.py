"""A centre as operators reach one in a cluster: two replicas of each service behind a name, over mutual TLS."""

import asyncio
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import yaml

from loadtests.chaos.names import NameServer
from loadtests.chaos.proxy import Connection, Proxy
from loadtests.chaos.rules import Line
from services.common.config import TlsConfig
from services.embedded.guard import Guard
from services.embedded.processes import free_port
from services.embedded.stack import SERVICES, Stack
from tests.support.service_process import ServiceProcess

ResultT = TypeVar("ResultT")
_START_S = 180.0


def centre_file(path: Path, targets: dict[str, dict[str, str]], operator: TlsConfig, **more: Any) -> Path:
    """Write the file that names a centre. targets: by service."""
    tls = {name: str(getattr(operator, name)) for name in ("ca", "certificate", "key")}
    path.write_text(yaml.safe_dump({**targets, "operator": tls, **more}), encoding="utf-8")
    return path


class Reached:
    """Two replicas of each service of a stack. Their certificates are for `localhost`, their names are others."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        self.stack = stack
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._port, self._names_port = free_port(), free_port()
        self._second: dict[str, ServiceProcess] = {}
        self._proxies: list[Proxy] = []
        self._names: Any = None

    @property
    def targets(self) -> dict[str, dict[str, str]]:
        """How an operator reaches them: all addresses of a name, verified for another name."""
        names = f"dns://127.0.0.1:{self._names_port}"
        return {
            name: {"target": f"{names}/{name}.reached.test:{self._port}", "server_name": "localhost"}
            for name in SERVICES
        }

    def start(self) -> None:
        self._thread.start()
        self._run(self._start())

    def stop(self) -> None:
        if not self._thread.is_alive():
            return
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def lose_first(self, name: str) -> None:
        """End one of the two replicas of a service, that of the stack."""
        self.stack.supervisor.stop(name)

    def _run(self, work: Coroutine[Any, Any, ResultT]) -> ResultT:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_START_S)

    async def _start(self) -> None:
        hosts: dict[str, list[str]] = {}
        for number, name in enumerate(SERVICES, 1):
            self._second[name] = await ServiceProcess(name, self._settings(name), self._folder).start()
            ports = int(self.stack.target(name).rsplit(":", 1)[1]), self._second[name].port
            hosts[f"{name}.reached.test"] = addresses = [f"127.79.{number}.{which}" for which in (1, 2)]
            for address, port in zip(addresses, ports, strict=True):
                proxy = Proxy(address, ("127.0.0.1", port), _calm)
                await proxy.start(address, self._port)
                self._proxies.append(proxy)
        self._names, _ = await self._loop.create_datagram_endpoint(
            lambda: NameServer(hosts), ("127.0.0.1", self._names_port)
        )

    def _settings(self, name: str) -> dict[str, Any]:
        """The configuration of a stack's service, for another process of it."""
        text = (self.stack.folder / "config" / f"{name}.yaml").read_text(encoding="utf-8")
        settings: dict[str, Any] = yaml.safe_load(text)
        settings["server"]["refusals"] = {"directory": str(self._folder / f"refusals-{name}")}
        settings["telemetry"] = {"log_level": "info"}
        if name == "registry":
            settings["enrolment"]["listen"] = f"127.0.0.1:{free_port()}"
        return settings

    async def _stop(self) -> None:
        if self._names is not None:
            self._names.close()
        for proxy in self._proxies:
            await proxy.stop()
        for process in self._second.values():
            await process.stop()


def _calm(_connection: Connection, _target: str) -> Line:
    return Line()


@contextmanager
def reached_centre(folder: Path) -> Iterator[Reached]:
    """Start everything, and end everything."""
    guard = Guard()
    stack = Stack(folder / "stack", guard=guard)
    reached = Reached(stack, folder)
    try:
        stack.start()
        reached.start()
        yield reached
    finally:
        reached.stop()
        stack.stop()
        guard.close()
