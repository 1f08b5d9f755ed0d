"""Ending asyncio tasks for certain."""

import asyncio
from collections.abc import Iterable
from typing import Any


async def until_cancelled() -> None:
    """Wait for ever: what a loop is doing that only has to clean up in the end."""
    await asyncio.Event().wait()


async def end_tasks(tasks: "Iterable[asyncio.Future[Any]]", *, again_s: float = 1.0) -> None:
    """Cancel tasks and wait until every one has ended; their results and errors stay in them.

    again_s: seconds after which a task that still runs is cancelled once more. Before Python 3.12 `asyncio.wait_for`,
    which database drivers use inside, loses a cancellation that arrives together with the result: a loop that was
    told only once would then go on for ever.
    """
    pending = [task for task in tasks if not task.done()]
    while pending:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=again_s)
        pending = [task for task in pending if not task.done()]
