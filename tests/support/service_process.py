"""Services as real processes of their own, forked from one that has imported them: importing takes most of a start."""

import asyncio
import json
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import psutil
import yaml

_START_S = 120.0
_STOP_S = 60.0
_PAUSE_S = 0.01


@dataclass
class ServiceProcess:
    """`python -m services.<name>`; it listens on a free port, the same one after a restart."""

    name: str
    config: dict[str, Any]
    folder: Path
    port: int = 0
    _process: ForkServerProcess | None = None

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def log(self) -> list[str]:
        """The lines that it wrote to its standard error, before and after a restart."""
        return self._log_file.read_text().splitlines(keepends=True) if self._log_file.exists() else []

    async def start(self) -> "ServiceProcess":
        self.config["server"]["listen"] = f"127.0.0.1:{self.port}"
        path = self.folder / f"{self.name}-{id(self)}.yaml"
        path.write_text(yaml.safe_dump(self.config), encoding="utf-8")
        before = len(self.log)
        told = (self.name, str(path), str(self._log_file), os.getpid())
        self._process = _fork_server().Process(target=_serve, args=told)
        await asyncio.to_thread(self._process.start)
        async with asyncio.timeout(_START_S):
            while not (ports := [port for line in self.log[before:] if (port := _port(line))]):
                assert self._process.is_alive(), f"{self.name} ended: {''.join(self.log)}"
                await asyncio.sleep(_PAUSE_S)
        self.port = ports[0]
        return self

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it by a signal. Returns its exit code, as subprocess.Popen does."""
        process = self._process
        assert process is not None
        if process.is_alive():
            assert process.pid is not None
            os.kill(process.pid, number)
        async with asyncio.timeout(_STOP_S):
            while process.is_alive():  # noqa: ASYNC110 - a process ends without an event
                await asyncio.sleep(_PAUSE_S)
        assert process.exitcode is not None
        return process.exitcode

    @property
    def _log_file(self) -> Path:
        return self.folder / f"{self.name}-{id(self)}.log"


def _port(line: str) -> int | None:
    """The port that a line of a log says is listened on, if it does and is whole."""
    if '"event": "listening"' not in line or not line.endswith("\n"):
        return None
    return int(json.loads(line)["port"])


@cache
def _fork_server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["services.aggregator.main", "services.coordinator.main"])
    return context


def _serve(name: str, config: str, log: str, tests: int) -> None:
    """In the new process: what the command line would do, for as long as the tests' process is there."""
    descriptor = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(descriptor, sys.stderr.fileno())
    threading.Thread(target=_end_with, args=(tests,), daemon=True).start()
    sys.argv = [f"services.{name}", "--config", config]
    runpy.run_module(f"services.{name}", run_name="__main__", alter_sys=True)


def _end_with(process: int) -> None:
    while psutil.pid_exists(process):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
