"""`python -m loadtests.silent`: what a silent replica costs calls, with second tries and without (ADR 25).

Three replicas of a service in this process, each behind a proxy; for a while one of them takes connections and calls
and answers none. Callers are a busy channel, as a service has, and quiet ones, as hospitals have. An open loop: latency
counts from when a call was due.
"""

import argparse
import asyncio
import sys
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

from loadtests.chaos.schedule import arrivals
from loadtests.peers.percentiles import percentile
from services.common.errors import FedmeshError
from services.common.grpc.client import DEFAULT_TIMEOUT_S, MeshChannel
from services.common.grpc.second_try import MOST, WAIT_S
from tests.support.replicas import Replicas, running_replicas

REPLICAS: Final = 3
QUIET: Final = 20
BEFORE_S: Final = 3.0
SILENT_S: Final = 15.0
# A call that may take longer than usual gets no second try.
WITHOUT: Final = DEFAULT_TIMEOUT_S + 0.001


# As long as it takes until the last try, and that one's answer.
LIMIT_MS: Final = (MOST + 1) * WAIT_S * 1000


class Calls:
    """Latencies in milliseconds of calls that were due while a replica was silent."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.failed = 0

    async def make(self, replicas: Replicas, channel: MeshChannel, timeout_s: float, due: float, counts: bool) -> None:
        failed = False
        try:
            await replicas.ask(channel, timeout_s=timeout_s)
        except FedmeshError:
            failed = True
        if counts:
            self.failed += failed
            self.ms.append((asyncio.get_running_loop().time() - due) * 1000)

    def line(self, name: str) -> str:
        figures = "".join(f"{percentile(self.ms, share):>10.0f}" for share in (0.5, 0.9, 0.99))
        return f"{name:<22}{len(self.ms):>7}{self.failed:>8}{figures}"


async def strike(rate: float, timeout_s: float) -> tuple[Calls, Calls]:
    """Calls of the busy channel and of the quiet ones, all together `rate` a second by either."""
    loop, busy, quiet = asyncio.get_running_loop(), Calls(), Calls()
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        replicas = await stack.enter_async_context(running_replicas(folder, REPLICAS))
        tls = replicas.ca.issue_hospital("h-1")
        channels = [await stack.enter_async_context(MeshChannel(replicas.target, tls)) for _ in range(QUIET + 1)]
        await asyncio.gather(*(replicas.all_answer(channel) for channel in channels))
        begun, silent, under_way = loop.time(), False, []
        for number, due in enumerate(arrivals(2 * rate, seed=1)):
            if due > BEFORE_S + SILENT_S:
                break
            await asyncio.sleep(max(0.0, begun + due - loop.time()))
            if due > BEFORE_S and not silent:
                silent = True
                replicas.audits[0].cut(True)
            calls, channel = (busy, channels[0]) if number % 2 else (quiet, channels[1 + number // 2 % QUIET])
            under_way.append(loop.create_task(calls.make(replicas, channel, timeout_s, begun + due, silent)))
        await asyncio.gather(*under_way)
    return busy, quiet


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.silent", description=__doc__)
    parser.add_argument("--rate", type=float, default=20.0, help="calls a second of either kind (%(default)s)")
    rate = parser.parse_args().rate
    if rate <= 0:
        parser.error("--rate is more than 0")
    print(f"one of {REPLICAS} replicas silent for {SILENT_S:g} s\n")
    print(f"{'':<22}{'calls':>7}{'failed':>8}{'p50 ms':>10}{'p90 ms':>10}{'p99 ms':>10}")
    for said, timeout_s in (("one try", WITHOUT), ("second tries", DEFAULT_TIMEOUT_S)):
        busy, quiet = asyncio.run(strike(rate, timeout_s))
        print(busy.line(f"{said}, busy"), quiet.line(f"{said}, quiet"), sep="\n", flush=True)
    late = [calls for calls in (busy, quiet) if calls.failed or percentile(calls.ms, 0.99) > LIMIT_MS]
    if late:
        print(f"MISSED with second tries no call fails, and p99 is under {LIMIT_MS:g} ms")
    return 1 if late else 0


if __name__ == "__main__":
    sys.exit(main())
