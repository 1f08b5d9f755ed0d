"""A pool of disposable processes for work on bytes that a peer made up.

Code that crashes or hangs on crafted input, numpy's as any other, costs one child process here, not the service. A
child is started by spawn (it inherits no sockets, keys or locks), ignores the terminal's Ctrl-C, leaves no core dump,
and goes away when its parent does. What a child sends back is a tag and raw bytes, never a pickle: a child that was
taken over cannot run code in its parent.
"""

import asyncio
import contextlib
import importlib
import json
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Final

from services.common.errors import Code, FedmeshError

_RESULT: Final = b"r"
_REFUSED: Final = b"e"
_FAILED: Final = b"f"
_READY: Final = b"k"

_START_TIMEOUT_SECONDS: Final = 60.0
_CRASH_SIGNALS: Final = frozenset(
    {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}
)


class _Worker:
    """One child process and the pipe to it. Every method blocks: call it from a thread."""

    def __init__(self, preload: tuple[str, ...]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, preload), daemon=True, name="disposable")
        self._process.start()
        theirs.close()
        self._ready = False

    def wait_ready(self) -> None:
        """Wait until the child has imported its modules, so that starting never counts against a call's deadline."""
        if self._ready:
            return
        try:
            self._ready = self._pipe.poll(_START_TIMEOUT_SECONDS) and self._pipe.recv_bytes() == _READY
        except (EOFError, OSError):
            self._ready = False
        if not self._ready:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "a worker process did not start; try again")

    def call(self, function: Callable[..., bytes], args: tuple[object, ...], timeout_seconds: float) -> bytes:
        deadline = time.monotonic() + timeout_seconds
        try:
            self._pipe.send((function, args))
            if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
                raise FedmeshError(
                    Code.DEADLINE_EXCEEDED, f"the upload was not processed within {timeout_seconds:g} s", stage="worker"
                )
            answer = self._pipe.recv_bytes()
        except (EOFError, OSError) as error:
            raise self._died() from error
        return _open(answer)

    def _died(self) -> FedmeshError:
        self._process.join(timeout=5)
        code = self._process.exitcode
        if code is not None and -code in _CRASH_SIGNALS:
            return FedmeshError(
                Code.CIPHERTEXT_INVALID,
                "the upload crashed its parser and was rejected",
                signal=signal.Signals(-code).name,
            )
        # Killed from outside (for example for want of memory): no fault of the upload's sender.
        return FedmeshError(Code.SERVICE_UNAVAILABLE, "the worker process was stopped; try again", exit_code=code)

    def kill(self) -> None:
        """End the child at once; a call in flight on another thread then fails."""
        with contextlib.suppress(ValueError):  # already closed
            self._process.kill()

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._pipe.close()
        self._process.close()


class DisposablePool:
    """Runs functions of hostile bytes, `workers` at a time; use it as an async context manager.

    Args:
        workers: child processes; each is replaced after a crash, a timeout or a cancelled call.
        timeout_seconds: hard limit for one call, after which its process is killed.
        preload: modules that a child imports when it starts.
    """

    def __init__(
        self,
        workers: int = 1,
        timeout_seconds: float = 30.0,
        preload: tuple[str, ...] = ("services.secure_sum.public",),
    ) -> None:
        self._timeout_seconds = timeout_seconds
        self._preload = preload
        self._threads = ThreadPoolExecutor(max_workers=workers, thread_name_prefix="disposable")
        self._slots: asyncio.Queue[_Worker | None] = asyncio.Queue()
        for _ in range(workers):
            self._slots.put_nowait(None)
        self._live: set[_Worker] = set()
        self._closed = False
        self.waiting = 0
        """Calls that wait for a worker."""

    async def __aenter__(self) -> "DisposablePool":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def warm(self) -> None:
        """Start one worker ahead of the first call.

        Raises:
            FedmeshError: SERVICE_UNAVAILABLE if it does not start.
        """
        await self.run(_nothing)

    async def run(self, function: Callable[..., bytes], *args: object, timeout_seconds: float | None = None) -> bytes:
        """Run `function(*args)` in a child and return its bytes.

        `function` must be importable by name, return bytes, and report refusals as FedmeshError.

        Raises:
            FedmeshError: what `function` raised; CIPHERTEXT_INVALID if it crashed the process; DEADLINE_EXCEEDED if it
                ran into the time limit; SERVICE_UNAVAILABLE if the process was killed or did not start, or the pool
                is closed; INTERNAL for any other exception in `function`.
        """
        self.waiting += 1
        try:
            worker = await self._slots.get()
        finally:
            self.waiting -= 1
        healthy = False
        try:
            if self._closed:
                raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the service is stopping")
            worker, answer = await self._on_thread(worker, function, args, timeout_seconds or self._timeout_seconds)
            healthy = True
            if isinstance(answer, FedmeshError):
                raise answer
            return answer
        finally:
            self._slots.put_nowait(worker if healthy else None)

    async def _on_thread(
        self,
        worker: _Worker | None,
        function: Callable[..., bytes],
        args: tuple[object, ...],
        timeout_seconds: float,
    ) -> tuple[_Worker, bytes | FedmeshError]:
        held: list[_Worker] = [] if worker is None else [worker]
        call = asyncio.get_running_loop().run_in_executor(
            self._threads, self._call, held, function, args, timeout_seconds
        )
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            # The thread cannot be interrupted, but it ends as soon as its child does.
            call.add_done_callback(self._discard)
            for started in held:
                started.kill()
            raise

    def _call(
        self, held: list[_Worker], function: Callable[..., bytes], args: tuple[object, ...], timeout_seconds: float
    ) -> tuple[_Worker, bytes | FedmeshError]:
        """Runs on a thread. Returns a worker that may be used again, or raises after closing it."""
        if not held:
            held.append(_Worker(self._preload))
            self._live.add(held[0])
        worker = held[0]
        try:
            worker.wait_ready()
            return worker, worker.call(function, args, timeout_seconds)
        except _RefusedError as refused:
            return worker, refused.error
        except BaseException:
            self._close_worker(worker)
            raise

    def _discard(self, call: "asyncio.Future[tuple[_Worker, bytes | FedmeshError]]") -> None:
        if not call.cancelled() and call.exception() is None:
            self._close_worker(call.result()[0])

    def _close_worker(self, worker: _Worker) -> None:
        self._live.discard(worker)
        worker.close()

    async def close(self) -> None:
        """Kill every child, after which calls in flight fail; idempotent."""
        self._closed = True
        for worker in list(self._live):
            worker.kill()
        await asyncio.to_thread(self._threads.shutdown)
        for worker in list(self._live):
            self._close_worker(worker)


class _RefusedError(Exception):
    """The function itself raised; the worker is sound."""

    def __init__(self, error: FedmeshError) -> None:
        super().__init__()
        self.error = error


def _open(answer: bytes) -> bytes:
    tag, content = answer[:1], answer[1:]
    if tag == _RESULT:
        return content
    if tag == _REFUSED:
        raise _RefusedError(_decode_error(content))
    raise _RefusedError(FedmeshError(Code.INTERNAL, "a worker failed", kind=content[:200].decode("ascii", "replace")))


def _decode_error(content: bytes) -> FedmeshError:
    try:
        code, message, detail = json.loads(content)
        return FedmeshError(Code(code), str(message), **{str(k): v for k, v in dict(detail).items()})
    except (ValueError, TypeError):
        return FedmeshError(Code.CIPHERTEXT_INVALID, "the upload was rejected")


def _nothing() -> bytes:
    return b""


def _serve(pipe: Connection, preload: tuple[str, ...]) -> None:
    """The child's whole life: answer calls until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A crash is reported by the parent; the child's own last words would only confuse the service's log.
    devnull = os.open(os.devnull, os.O_WRONLY)
    for module in preload:
        importlib.import_module(module)
    pipe.send_bytes(_READY)
    os.dup2(devnull, 2)
    while True:
        try:
            function, args = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer = _RESULT + function(*args)
        except FedmeshError as error:
            answer = _REFUSED + json.dumps([error.code.value, error.message, error.detail]).encode()
        except Exception as error:
            answer = _FAILED + type(error).__name__.encode()
        pipe.send_bytes(answer)
