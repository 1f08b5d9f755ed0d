"""A pool of disposable processes for work on bytes that a peer made up.

Code that crashes or hangs on crafted input, numpy's as any other, costs one child process here, not the service. A
child is started by spawn (it inherits no sockets, keys or locks), ignores the terminal's Ctrl-C, leaves no core dump,
and goes away when its parent does. What a child sends back is a tag and raw bytes, never a pickle: a child that was
taken over cannot run code in its parent.

A function of many large byte strings takes them one by one: whenever it wants the next, its child asks for it. Nobody
holds more than one of them, and nothing is sent that the child does not wait for.
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
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Final

from services.common.errors import Code, FedmeshError

_RESULT: Final = b"r"
_REFUSED: Final = b"e"
_FAILED: Final = b"f"
_READY: Final = b"k"
_MORE: Final = b"m"

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

    def begin(
        self, function: Callable[..., bytes], args: tuple[object, ...], fed: bool, timeout_seconds: float
    ) -> bytes | None:
        """Begin a call. fed: the function also takes an iterator of parts, see `give`.

        Returns what the function returned, or None when the child asks for the next part.
        """
        return self._exchange(lambda: self._pipe.send((function, args, fed)), timeout_seconds)

    def give(self, part: bytes, timeout_seconds: float) -> bytes | None:
        """Give the part that the child asked for; an empty one says that there is none. Returns as `begin`."""
        answer = self._exchange(lambda: self._pipe.send_bytes(part), timeout_seconds)
        if answer is None and not part:
            raise FedmeshError(Code.INTERNAL, "a worker asked for more than there is")
        return answer

    def _exchange(self, send: Callable[[], None], timeout_seconds: float) -> bytes | None:
        deadline = time.monotonic() + timeout_seconds
        try:
            send()
            tag = self._receive(deadline)
            content = None if tag == _MORE else self._receive(deadline)
        except TimeoutError:
            raise FedmeshError(
                Code.DEADLINE_EXCEEDED, f"the upload was not processed within {timeout_seconds:g} s", stage="worker"
            ) from None
        except (EOFError, OSError) as error:
            raise self._died() from error
        return None if content is None else _open(tag, content)

    def _receive(self, deadline: float) -> bytes:
        if not self._pipe.poll(max(0.0, deadline - time.monotonic())):
            raise TimeoutError
        return self._pipe.recv_bytes()

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
        timeout_seconds: hard limit for one call, or for what it does with one part, after which its process is killed.
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

    async def run(
        self,
        function: Callable[..., bytes],
        *args: object,
        parts: Iterator[Awaitable[bytes]] | None = None,
        timeout_seconds: float | None = None,
    ) -> bytes:
        """Run `function(*args)` in a child and return its bytes.

        `function` must be importable by name, return bytes, and report refusals as FedmeshError. With `parts` it takes
        one more argument, an iterator of bytes; each part, which is not empty, is awaited when the function wants it.

        Raises:
            FedmeshError: what `function` raised; CIPHERTEXT_INVALID if it crashed the process; DEADLINE_EXCEEDED if it
                ran into the time limit; SERVICE_UNAVAILABLE if the process was killed or did not start, or the pool
                is closed; INTERNAL for any other exception in `function`.
            Exception: what a part raised.
        """
        limit_s = timeout_seconds or self._timeout_seconds
        self.waiting += 1
        try:
            worker = await self._slots.get()
        finally:
            self.waiting -= 1
        healthy = False
        try:
            begin = partial(_Worker.begin, function=function, args=args, fed=parts is not None, timeout_seconds=limit_s)
            worker, answer = await self._on_thread(worker, begin)
            while answer is None:
                give = partial(_Worker.give, part=await self._next(worker, parts), timeout_seconds=limit_s)
                worker, answer = await self._on_thread(worker, give)
            healthy = True
            if isinstance(answer, FedmeshError):
                raise answer
            return answer
        finally:
            self._slots.put_nowait(worker if healthy else None)

    async def _next(self, worker: _Worker, parts: Iterator[Awaitable[bytes]] | None) -> bytes:
        """The part that a worker waits for, or nothing after the last one."""
        try:
            awaited = next(parts, None) if parts else None
            if awaited is None:
                return b""
            part = await awaited
            if not part:
                raise ValueError("a part is empty: that would end them")
            return part
        except BaseException:
            # It is in the middle of a call that nobody will end.
            self._close_worker(worker)
            raise

    async def _on_thread(
        self, worker: _Worker | None, step: Callable[[_Worker], bytes | None]
    ) -> tuple[_Worker, bytes | FedmeshError | None]:
        """A step of a call. Returns a worker that may be used again, or raises after closing it."""
        if self._closed:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the service is stopping")
        held: list[_Worker] = [] if worker is None else [worker]
        call = asyncio.get_running_loop().run_in_executor(self._threads, self._call, held, step)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            # The thread cannot be interrupted, but it ends as soon as its child does.
            call.add_done_callback(self._discard)
            for started in held:
                started.kill()
            raise

    def _call(
        self, held: list[_Worker], step: Callable[[_Worker], bytes | None]
    ) -> tuple[_Worker, bytes | FedmeshError | None]:
        """Runs on a thread, as `_on_thread`."""
        if not held:
            held.append(_Worker(self._preload))
            self._live.add(held[0])
        worker = held[0]
        try:
            worker.wait_ready()
            return worker, step(worker)
        except _RefusedError as refused:
            return worker, refused.error
        except BaseException:
            self._close_worker(worker)
            raise

    def _discard(self, call: "asyncio.Future[tuple[_Worker, bytes | FedmeshError | None]]") -> None:
        if not call.cancelled() and call.exception() is None:
            self._close_worker(call.result()[0])

    def _close_worker(self, worker: _Worker) -> None:
        if worker in self._live:
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


def _open(tag: bytes, content: bytes) -> bytes:
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
    with contextlib.suppress(EOFError, OSError):
        while True:
            _answer(pipe, *pipe.recv())


def _answer(pipe: Connection, function: Callable[..., bytes], args: tuple[object, ...], fed: bool) -> None:
    tag = _RESULT
    try:
        content = function(*args, *([_parts(pipe)] if fed else ()))
    except FedmeshError as error:
        tag, content = _REFUSED, json.dumps([error.code.value, error.message, error.detail]).encode()
    except Exception as error:
        tag, content = _FAILED, type(error).__name__.encode()
    # In two messages: one would be a copy.
    pipe.send_bytes(tag)
    pipe.send_bytes(content)


def _parts(pipe: Connection) -> Iterator[bytes]:
    """What the parent has for the call, each asked for when it is wanted."""

    def ask() -> bytes:
        pipe.send_bytes(_MORE)
        return pipe.recv_bytes()

    return iter(ask, b"")
