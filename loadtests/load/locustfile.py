"""Locust's users: `locust -f loadtests/load/locustfile.py`, or `make loadtest`, which takes them step by step.

Users decide when a call is due and tell Locust how it went. The calls themselves are made by fedmesh's own asyncio
clients, in the process behind `Link`: Locust patches the standard library for gevent, on which grpc.aio does not
run (ADR 50).
"""

import itertools
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

import gevent
from gevent.pool import Group
from locust import User, constant, events, task

ROOT: Final = Path(__file__).resolve().parents[2]
# Locust looks for modules beside this file alone.
sys.path.insert(0, str(ROOT))

from loadtests.load.link import Link  # noqa: E402 - found by the line above

_SEEDS: Final = itertools.count(1)


def open_loop(user: "Caller") -> float:
    """Seconds until a user's next call is due: at random, whatever became of the calls before (a Poisson process)."""
    user.due += user.chance.expovariate(user.per_second)
    return max(0.0, user.due - time.monotonic())


class Caller(User):
    """Makes calls in an open loop: none waits for another, and latency counts from when a call was due.

    per_second: calls of one user, on average; twenty users make twenty times as many.
    """

    abstract = True
    per_second = 1.0
    wait_time = open_loop

    def on_start(self) -> None:
        self.chance = random.Random(next(_SEEDS))  # noqa: S311 - a schedule
        self.due = time.monotonic()
        self.under_way = Group()
        gevent.sleep(open_loop(self))

    def on_stop(self) -> None:
        self.under_way.join()

    @task
    def begin(self) -> None:
        self.under_way.spawn(self._make, self.due)

    def _make(self, due: float) -> None:
        note(self, self.environment.link.ask(type(self).__name__, due=due))


class ControlPlane(Caller):
    """The mix of calls of `make chaos`, of hospitals, operators and services."""


class AuditStorm(Caller):
    """Ten events at once into the audit log, three times of four; else a proof."""


class UploadStorm(Caller):
    """Ciphertexts of fifteen hospitals; every fifteen of them are a sum of their own."""


class IdleHospital(User):
    """A hospital that waits for tasks: a stream with a certificate of its own. Counted is the time to its
    first word.
    """

    wait_time = constant(3600)
    hospital = ""

    def on_start(self) -> None:
        found = self.environment.link.ask("watch")
        self.hospital = found["hospital"]
        note(self, found)

    def on_stop(self) -> None:
        if self.hospital:
            self.environment.link.ask("leave", hospital=self.hospital)

    @task
    def wait_for_tasks(self) -> None:
        """Nothing to do: the stream is kept by the other process."""


USERS: Final = (ControlPlane, AuditStorm, UploadStorm, IdleHospital)


def note(user: User, found: dict[str, Any]) -> None:
    """Count an answered call in Locust's statistics."""
    user.environment.events.request.fire(
        request_type="gRPC",
        name=found["name"],
        response_time=found["ms"],
        response_length=found["bytes"],
        exception=RuntimeError(found["failed"]) if found["failed"] else None,
        context={},
    )


# ---- with Locust's own command: a stack of its own, which stays until Locust ends


@events.init_command_line_parser.add_listener
def _arguments(parser: Any) -> None:
    python = ROOT / ".venv" / "bin" / "python"
    parser.add_argument("--fedmesh-python", default=str(python), help="a Python that has fedmesh (%(default)s)")
    parser.add_argument(
        "--fedmesh-dir", default=str(ROOT / ".cache" / "locust"), help="the stack's folder (%(default)s)"
    )
    parser.add_argument("--params", type=int, default=100_000, help="integers in an upload (%(default)s)")


@events.init.add_listener
def _start(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    command = [options.fedmesh_python, "-m", "loadtests.load.serve", "--dir", options.fedmesh_dir]
    command += ["--params", str(options.params)]
    environment.serving = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    path = environment.serving.stdout.readline().strip()
    if not path:
        sys.exit(f"{options.fedmesh_python} could not start a stack; it said why above")
    environment.link = Link(path)


@events.quitting.add_listener
def _quit(environment: Any, **_: Any) -> None:
    environment.link.close()
    environment.serving.stdin.close()
    environment.serving.wait(60)
