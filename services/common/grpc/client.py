"""Client channels: mutual TLS, a deadline on every call, errors rebuilt, patience with dependencies that come back."""

import asyncio
import json
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import lru_cache, partial
from typing import Any, Final, TypeVar, cast

import grpc
from opentelemetry.propagate import inject
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, wait_exponential_jitter

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.certificates import note_own
from services.common.grpc.keepalive import client_keepalive
from services.common.grpc.objective import FAILED, objective_label
from services.common.grpc.retry_line import RetryLine
from services.common.grpc.second_try import Budget, first_answer
from services.common.grpc.server import MAX_MESSAGE_BYTES, bounded_read_ahead
from services.common.grpc.wire import from_rpc_error, to_status
from services.common.telemetry import CALLS_MADE, LATENCY_MADE, exemplar, get_logger
from services.common.tls import channel_credentials, file_stamps, load_tls

log = get_logger(__name__)

ResponseT = TypeVar("ResponseT")
StubT = TypeVar("StubT")

CHUNK_BYTES: Final = 1024 * 1024
# Where many streams are open at a time, messages are smaller: both ends hold each of them several times over, as a
# message, as its encoding, and as what gRPC makes of that.
PART_BYTES: Final = 64 * 1024
DEFAULT_TIMEOUT_S: Final = 10.0
# TCP, TLS and HTTP/2 take four round trips, more when packets are lost, and a moment on a machine that is busy.
_CONNECT_MS: Final = 5_000
# How often a channel looks at its certificate's files, and how long calls on an old connection may go on.
_LOOK_S: Final = 5.0
_LEAVE_S: Final = 300.0

# A replica that went away in mid-connection is no error to the caller: a call that finds nobody is made again, this
# many times in all, within its deadline. Longer outages are covered by `patience_s`.
# Not by gRPC's retries: with them gRPC 1.85 now and then ended the process when a replica died under an upload
# ("ILLEGAL STATE: FORWARDED_BATCH", https://github.com/grpc/grpc/issues/40283).
_TRIES: Final = 4
# Before its patience ends a call makes a last try, whoever else waits.
_CLOSE_S: Final = 0.5

_SERVICE_CONFIG: Final = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})


class MeshChannel:
    """A channel to one service. Close it when done, or use it as an async context manager.

    It follows its certificate: gRPC's credentials of a client are fixed, so calls that begin after the files changed
    go over a new connection, while those under way get `_LEAVE_S` seconds to end on the old one.
    """

    def __init__(
        self,
        target: str,
        tls: TlsConfig,
        *,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        bearer: Callable[[], str | None] | None = None,
        server_name: str | None = None,
    ) -> None:
        """bearer: the token of the person who calls, asked for every call. server_name: what the server's certificate
        must be for, where that is not the target's own host name, as behind a tunnel.

        Raises: FedmeshError(CONFIG_INVALID) as `channel_credentials`.
        """
        self._bearer = bearer
        self.target = target
        self._tls = tls
        self._options = [*_channel_options(max_message_bytes), *named_server(server_name)]
        # Names what is wrong with the files; the stamps are older than what the connection is made with.
        note_own(load_tls(tls))
        self._looked_at = time.monotonic()
        self._stamps = file_stamps(tls)
        self._budget = Budget(self._connect_anew, self._connected)
        self._line = RetryLine()
        self._channel = self._connect()
        self._leaving: set[asyncio.Task[None]] = set()

    def stub(self, make: Callable[[grpc.aio.Channel], StubT]) -> StubT:
        """The generated stub of a service on this channel."""
        # It looks like a channel to a stub, which only ever asks it for methods.
        return make(cast(grpc.aio.Channel, _Methods(self._current, self._bearer, self._budget, self._line)))

    async def close(self) -> None:
        for task in self._leaving:
            task.cancel()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._channel.close()

    def _connect(self) -> grpc.aio.Channel:
        return grpc.aio.secure_channel(self.target, channel_credentials(self._tls), options=self._options)

    def _current(self) -> grpc.aio.Channel:
        """The channel for a call that begins now."""
        now = time.monotonic()
        if now - self._looked_at >= _LOOK_S:
            self._looked_at = now
            try:
                stamps = file_stamps(self._tls)
                if stamps != self._stamps:
                    note_own(load_tls(self._tls))
                    fresh = self._connect()
                    self._leave(self._channel)
                    self._channel, self._stamps = fresh, stamps
            except (OSError, FedmeshError) as error:
                # Half-written files in the middle of a renewal: the old ones go on, and are looked at again.
                log.warning("certificate_not_renewed", target=self.target, reason=str(error))
        return self._channel

    def _connected(self) -> bool:
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    def _connect_anew(self) -> None:
        """Change to new connections once one is there: a silent replica does not answer a handshake either."""
        self._keep(asyncio.ensure_future(self._change()))

    async def _change(self) -> None:
        before, fresh = self._channel, self._connect()
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CONNECT_MS / 1000):
                    await fresh.channel_ready()
                if self._channel is before:
                    self._channel, fresh = fresh, before
                    log.info("connected_anew", target=self.target)
        finally:
            await fresh.close(_LEAVE_S if fresh is before else None)

    def _leave(self, channel: grpc.aio.Channel) -> None:
        self._keep(asyncio.ensure_future(channel.close(_LEAVE_S)))

    def _keep(self, task: "asyncio.Task[None]") -> None:
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    async def __aenter__(self) -> "MeshChannel":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


class _Methods:
    """The methods of a channel that may be another one at every call."""

    def __init__(
        self,
        current: Callable[[], grpc.aio.Channel],
        bearer: Callable[[], str | None] | None,
        budget: Budget,
        line: RetryLine,
    ) -> None:
        self._current = current
        self._bearer = bearer
        self._budget = budget
        self._line = line

    def unary_unary(self, *method: Any, **codec: Any) -> Callable[..., Any]:
        return self._method("unary_unary", method, codec)

    def unary_stream(self, *method: Any, **codec: Any) -> Callable[..., Any]:
        return self._method("unary_stream", method, codec)

    def stream_unary(self, *method: Any, **codec: Any) -> Callable[..., Any]:
        return self._method("stream_unary", method, codec)

    def stream_stream(self, *method: Any, **codec: Any) -> Callable[..., Any]:
        return self._method("stream_stream", method, codec)

    def _method(self, kind: str, method: tuple[Any, ...], codec: dict[str, Any]) -> Callable[..., Any]:
        made: tuple[grpc.aio.Channel, Any] | None = None

        def begin(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            channel = self._current()
            if made is None or made[0] is not channel:
                made = (channel, getattr(channel, kind)(*method, **codec))
            token = self._bearer() if self._bearer else None
            if token is not None:
                options["metadata"] = (*(options.get("metadata") or ()), ("authorization", f"Bearer {token}"))
            return made[1](*arguments, **options)

        begin.path = method[0]  # type: ignore[attr-defined]
        if kind == "unary_unary" and objective_label(method[0]) == "yes":
            begin.second_tries = self._budget  # type: ignore[attr-defined]
            begin.retry_line = self._line  # type: ignore[attr-defined]
        return begin


def named_server(name: str | None) -> list[tuple[str, Any]]:
    """Channel options: verify a server's certificate for this name in place of the target's host. None: as it is.

    In spite of the option's place among those for tests, the certificate is verified as ever, by the authorities too.
    """
    return [] if name is None else [("grpc.ssl_target_name_override", name)]


def _channel_options(max_message_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.enable_retries", 0),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        *bounded_read_ahead(),
        *client_keepalive(),
        ("grpc.initial_reconnect_backoff_ms", 100),
        # In spite of its name: how long one try may take to connect, TLS and all.
        ("grpc.min_reconnect_backoff_ms", _CONNECT_MS),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        # 30 s by default: a rolling restart is over sooner, and would leave only addresses of pods that ended.
        ("grpc.dns_min_time_between_resolutions_ms", 1_000),
    ]


async def call(
    method: Callable[..., Any], request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S, patience_s: float = 0.0
) -> Any:
    """Make a call with one response. `request` is a message, or a function that makes the iterator of messages anew.

    timeout_s: deadline of each try. patience_s: how long retryable errors are retried (0: not at all, but for a server
        that is not there, up to four tries within `timeout_s`); safe because every mutation carries an idempotency id.
        For the same reason a small call that counts towards the objectives gets a second try within one deadline when
        no answer comes; not one with more time than usual, which is to take long.

    Raises: FedmeshError as the server raised it, or what the transport's status means.
    """
    with _counted(method):
        return await _tried(method, request, timeout_s, patience_s)


@contextmanager
def _counted(method: Callable[..., Any]) -> Iterator[None]:
    """Count a call as its caller sees it: once, when all tries are over."""
    path = getattr(method, "path", None)
    if path is None:
        # A method of a bare channel, in a test.
        yield
        return
    objective, code, started = _known(path), grpc.StatusCode.OK, time.perf_counter()
    try:
        yield
    except FedmeshError as error:
        code = to_status(error)[0]
        raise
    except asyncio.CancelledError:
        code = grpc.StatusCode.CANCELLED
        raise
    finally:
        CALLS_MADE.labels(path, code.name, objective).inc(exemplar=exemplar())
        LATENCY_MADE.labels(path, objective).observe(time.perf_counter() - started, exemplar())


@lru_cache(maxsize=1024)
def _known(path: str) -> str:
    """The objective label of a method, whose failures are counted from 0 on."""
    objective = objective_label(path)
    if objective == "yes":
        for code in (grpc.StatusCode.OK, *FAILED):
            CALLS_MADE.labels(path, code.name, objective)
    return objective


async def _tried(method: Callable[..., Any], request: Any, timeout_s: float, patience_s: float) -> Any:
    budget: Budget | None = getattr(method, "second_tries", None)
    line: RetryLine | None = getattr(method, "retry_line", None)
    tries = _Tries(timeout_s, patience_s)
    async for attempt in tries:
        with attempt:
            # Those that may take long are few, and are not to keep a line waiting.
            if budget is None or line is None or callable(request) or timeout_s > DEFAULT_TIMEOUT_S:
                return await _once(method, request, tries.time_left_s())
            first = attempt.retry_state.attempt_number == 1
            async with nullcontext() if first else line.turn(tries.patience_left_s()):
                return await first_answer(partial(_once, method, request), tries.time_left_s(), budget)
    raise AssertionError("tenacity reraises")


async def _once(method: Callable[..., Any], request: Any, timeout_s: float) -> Any:
    payload = request() if callable(request) else request
    under_way = method(payload, timeout=timeout_s, metadata=_trace_metadata())
    first = _FirstStatus(under_way) if callable(request) else None
    try:
        return await under_way
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(first.instead_of(error) if first else error) from None
    except asyncio.CancelledError:
        _require_cancelled()
        raise _connection_left() from None


async def stream(method: Callable[..., Any], request: Any, *, timeout_s: float | None = None) -> AsyncIterator[Any]:
    """Make a call with a stream of responses. Made again when no server is there, until the first response came.

    Raises: FedmeshError as the server raised it, or what the transport's status means.
    """
    tries = _Tries(math.inf if timeout_s is None else timeout_s, 0.0)
    async for attempt in tries:
        with attempt:
            left_s = None if timeout_s is None else tries.time_left_s()
            responses = _responses(method(request, timeout=left_s, metadata=_trace_metadata()))
            first = await anext(responses, None)
    if first is not None:
        yield first
        async for response in responses:
            yield response


async def _responses(under_way: Any) -> AsyncIterator[Any]:
    try:
        async for response in under_way:
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    except asyncio.CancelledError:
        _require_cancelled()
        raise _connection_left() from None


def _require_cancelled() -> None:
    """Go on with a cancellation that is meant for the caller's task: a channel that closes cancels its calls likewise.

    Raises: CancelledError.
    """
    task = asyncio.current_task()
    if task is None or task.cancelling():
        raise asyncio.CancelledError


def _connection_left() -> FedmeshError:
    return FedmeshError(Code.SERVICE_UNAVAILABLE, "the connection was left for a new one")


class _FirstStatus:
    """The status with which a call ended first.

    When a server refuses a stream in its middle, the client's next write fails, and grpc.aio then reports that failure
    (INTERNAL) in place of the refusal that it already has (https://github.com/grpc/grpc/issues/36066).
    """

    def __init__(self, under_way: Any) -> None:
        self._error: grpc.aio.AioRpcError | None = None
        under_way.add_done_callback(self._keep)

    def _keep(self, ended: Any) -> None:
        if self._error is not None:
            return
        code, trailing = _now(ended.code()), _now(ended.trailing_metadata())
        self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=_now(ended.details()))

    def instead_of(self, error: grpc.aio.AioRpcError) -> grpc.aio.AioRpcError:
        """The first status, if the one that was raised may have taken its place."""
        if error.code() is grpc.StatusCode.INTERNAL and self._error is not None:
            return self._error
        return error


def _now(ready: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing left to wait for: later is too late, the status would be overwritten.

    Raises: RuntimeError if it did wait.
    """
    try:
        ready.send(None)
    except StopIteration as done:
        return done.value
    ready.close()
    raise RuntimeError("the call has no status yet")


def chunks(content: bytes, size: int = CHUNK_BYTES) -> Iterable[bytes]:
    """Cut bytes into chunks of at most 1 MiB, or another size, in order."""
    return (content[start : start + size] for start in range(0, len(content), size))


class _Tries(AsyncRetrying):
    """The tries of one call: while patience lasts for what is retryable, and some for a server that is not there."""

    def __init__(self, timeout_s: float, patience_s: float) -> None:
        super().__init__(
            retry=retry_if_exception(lambda error: isinstance(error, FedmeshError) and error.retryable),
            stop=self._is_last,
            wait=wait_exponential_jitter(initial=0.1, max=2.0, jitter=random.uniform(0.05, 0.2)),  # noqa: S311 - spreads load
            reraise=True,
        )
        self._timeout_s = timeout_s
        self._patience_s = patience_s
        self._began = time.monotonic()

    def time_left_s(self) -> float:
        """Deadline of the next try in seconds: without patience, what is left of the first one's."""
        elapsed_s = time.monotonic() - self._began
        if elapsed_s < self._patience_s:
            return self._timeout_s
        return max(self._timeout_s - elapsed_s, 0.0)

    def patience_left_s(self) -> float:
        """Seconds in which a try may still begin with its whole deadline."""
        return max(0.0, self._began + self._patience_s - time.monotonic() - _CLOSE_S)

    def _is_last(self, state: RetryCallState) -> bool:
        if time.monotonic() - self._began < self._patience_s:
            return False
        error = state.outcome.exception() if state.outcome else None
        away = isinstance(error, FedmeshError) and to_status(error)[0] is grpc.StatusCode.UNAVAILABLE
        # A try with little time would end with its deadline, and hide the reason that is known already.
        return not away or state.attempt_number >= _TRIES or self.time_left_s() < self._timeout_s / 2


def _trace_metadata() -> tuple[tuple[str, str], ...]:
    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())
