"""A loop that loses a cancellation is ended all the same."""

import asyncio

from services.common.tasks import end_tasks


async def _deaf(losses: int, heard: list[int]) -> None:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            heard.append(1)
            if len(heard) > losses:
                raise


async def test_task_that_loses_cancellations_is_cancelled_again() -> None:
    heard: list[int] = []
    task = asyncio.create_task(_deaf(3, heard))
    await asyncio.sleep(0)

    await end_tasks([task], again_s=0.01)

    assert task.cancelled()
    assert len(heard) == 4


async def test_ended_and_failed_tasks_are_left_as_they_are() -> None:
    async def fail() -> None:
        raise ValueError

    failed = asyncio.create_task(fail())
    await asyncio.sleep(0)

    await end_tasks([failed])

    assert isinstance(failed.exception(), ValueError)
