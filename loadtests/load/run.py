"""A stack to load, a driver that makes the calls, and Locust, which asks for them."""

import asyncio
import json
import resource
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from loadtests.load.consortium import SETTINGS, Clients, begin, member_names
from loadtests.load.driver import Driver, serve
from loadtests.load.figures import Scenario
from loadtests.load.settings import Options
from loadtests.load.steps import steps
from loadtests.peers.environments import ROOT
from loadtests.peers.settings import Tell
from services.common.errors import Code, FedmeshError
from services.embedded.guard import Guard
from services.embedded.stack import Stack

_FILES: Final = 8192


@contextmanager
def running_stack(folder: Path, tell: Tell) -> Iterator[Stack]:
    """A founded stack in a folder that is emptied first; stopped afterwards.

    Raises: FedmeshError: a part did not start.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _allow_files()
    guard = Guard()
    stack = Stack(folder, guard=guard, settings=SETTINGS)
    try:
        tell("starting the stack")
        stack.start()
        stack.found(member_names())
        yield stack
    finally:
        stack.stop()
        guard.close()


@asynccontextmanager
async def driving(stack: Stack, params: int, tell: Tell) -> AsyncIterator[tuple[Driver, Path]]:
    """A driver for the stack, and the socket at which it listens."""
    # A Unix socket's path has 107 bytes at most, and the stack's may be longer.
    with tempfile.TemporaryDirectory(prefix="fedmesh-load-") as folder:
        async with Clients(stack) as clients:
            known = await begin(stack, clients, params)
            driver, path = Driver(stack, clients, known, params, tell), Path(folder) / "socket"
            server = await serve(driver, path)
            try:
                yield driver, path
            finally:
                server.close()
                await driver.close()


def run_load(options: Options, locust: Path, tell: Tell) -> list[Scenario]:
    """Start a stack, load it, and leave nothing running. locust: the Python that has it.

    Raises: FedmeshError: a part did not start, or hospitals could not connect.
    """
    with running_stack(options.folder, tell) as stack:
        return asyncio.run(_scenarios(options, stack, locust, tell))


async def _scenarios(options: Options, stack: Stack, locust: Path, tell: Tell) -> list[Scenario]:
    async with driving(stack, min(options.params), tell) as (driver, path):
        plan = json.dumps([asdict(step) for step in steps(options)])
        users = await asyncio.create_subprocess_exec(
            *(locust, "-m", "loadtests.load.headless", str(path), plan), cwd=ROOT, stdin=asyncio.subprocess.DEVNULL
        )
        try:
            if await users.wait() != 0:
                raise FedmeshError(Code.INTERNAL, "Locust ended before the steps did; it said why above")
        finally:
            if users.returncode is None:
                users.kill()
                await users.wait()
        return driver.scenarios


def _allow_files() -> None:
    """Every hospital is a connection here and another in the coordinator, which inherits the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < _FILES:
        most = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def stamp() -> str:
    """Now, for a report."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
