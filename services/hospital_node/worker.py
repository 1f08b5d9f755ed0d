"""One thread for everything slow, so that the event loop, and with it the heartbeats, never waits for mathematics."""

import asyncio
import concurrent.futures
import contextvars
import queue
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class WorkerThread:
    """Runs functions one after another. TensorFlow sessions and trainers are used from one such thread only.

    It is a daemon thread and not a ThreadPoolExecutor, whose exit hook would hold up SIGTERM until training ends.
    """

    def __init__(self, name: str = "worker") -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._busy = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a function is running now."""
        return self._busy

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run a function and await its result. Cancelling skips it if it has not begun, else lets it finish unheard."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        context = contextvars.copy_context()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result: Any = context.run(function, *args, **kwargs)
            except BaseException as error:  # it belongs to whoever awaits the future
                future.set_exception(error)
            else:
                future.set_result(result)

        self._jobs.put(job)
        return await asyncio.wrap_future(future)

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            self._busy = True
            job()
            self._busy = False
