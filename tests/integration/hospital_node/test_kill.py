"""Real processes that are killed or told to stop in mid-work."""

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml
from fedmesh.coordinator.v1 import coordinator_pb2 as pb

from services.common.clock import SystemClock
from services.hospital_node.config import HospitalConfig
from services.hospital_node.store.ledger import SqliteLedger, read_ledger
from services.privacy.budget import Limit
from tests.integration.hospital_node.conftest import Consortium

ROOT = Path(__file__).parents[3]


@asynccontextmanager
async def node_process(consortium: Consortium, **environment: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """h1 as a process; killed at the end."""
    config: HospitalConfig = consortium.nodes["h1"].config
    file = config.data_dir.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.hospital_process", "--config", str(file)),
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        await consortium.centre.connected(["h1"])
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        consortium.centre.watching.pop("h1", None)


async def test_sigterm_while_training(consortium: Consortium, tmp_path: Path) -> None:
    consortium.create_job()
    started = tmp_path / "child"
    async with node_process(consortium, FEDMESH_TEST_STALL=str(started)) as process:
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
        async with asyncio.timeout(20):
            while not (started.exists() and started.read_text()):  # noqa: ASYNC110 - what is awaited is a file
                await asyncio.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 20) == 0
    child = Path("/proc") / started.read_text()
    assert not child.exists() or "(sleep) Z" in (child / "stat").read_text()


async def test_sigkill_in_mid_upload(consortium: Consortium) -> None:
    consortium.create_job()
    async with node_process(consortium):
        await consortium.trained(["h1"])
        await consortium.shared(["h1"])
        consortium.centre.faults.held["Upload"] = asyncio.Event()
        consortium.ask_upload(["h1"])
        await consortium.centre.reported("bytes", ["h1"])
    consortium.centre.faults.held.clear()
    async with node_process(consortium):
        consortium.ask_upload(["h1"])
        await consortium.centre.reported("uploaded", ["h1"])
    contents = [content for _, kind, content in consortium.centre.reports if kind == "bytes"]
    assert len(contents) == 2
    assert contents[0] == contents[1]
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 1


async def test_sigkill_at_any_moment_never_sends_other_bytes(consortium: Consortium) -> None:
    """Killed again and again at moments that differ: one attempt has one ciphertext and one charge."""
    consortium.create_job()
    async with node_process(consortium):
        await consortium.trained(["h1"])
        await consortium.shared(["h1"])
    for delay_s in (0.0, 0.01, 0.03, 0.1):
        async with node_process(consortium):
            consortium.tell(["h1"], consortium.task(pb.TASK_KIND_TRAIN))
            consortium.tell(["h1"], consortium.task(pb.TASK_KIND_SHARE))
            consortium.ask_upload(["h1"])
            await asyncio.sleep(delay_s)
    async with node_process(consortium):
        consortium.ask_upload(["h1"])
        await consortium.centre.reported("uploaded", ["h1"])
    contents = {content for _, kind, content in consortium.centre.reports if kind == "bytes"}
    assert len(contents) == 1
    assert read_ledger(consortium.nodes["h1"].config.data_dir)[0].charged == 1


@pytest.mark.slow
async def test_sigkill_from_the_upload_on_leaves_the_budget_spent(consortium: Consortium) -> None:
    """Killed again and again in an attempt that is then aborted, of a job that is cancelled: it is spent, once."""
    consortium.create_job()
    home = consortium.nodes["h1"].config.data_dir
    others = [name for name in consortium.nodes if name != "h1"]
    await consortium.start(others)

    async def killed_after(step: Callable[[], Awaitable[None]]) -> int:
        async with node_process(consortium):
            await step()
        return read_ledger(home)[0].charged

    async def share() -> None:
        await consortium.trained()
        await consortium.shared()

    async def reveal() -> None:
        await consortium.confirmed()
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_UNMASK))
        await consortium.centre.reported("reveal", ["h1"])

    async def abort() -> None:
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_ABORTED, reason="nobody came back"))
        consortium.tell(["h1"], consortium.task(pb.TASK_KIND_JOB_ENDED, reason="cancelled"))
        async with asyncio.timeout(20):
            while list((home / "ciphertexts").iterdir()):  # noqa: ASYNC110 - what is awaited is a file
                await asyncio.sleep(0.02)

    assert await killed_after(share) == 0
    assert await killed_after(consortium.uploaded) == 1
    assert await killed_after(reveal) == 1
    assert await killed_after(abort) == 1
    assert not read_ledger(home)[0].released
    config = consortium.nodes["h1"].config
    assert SqliteLedger(home, SystemClock(), Limit(config.privacy.epsilon_limit)).left(config.population) == 0
