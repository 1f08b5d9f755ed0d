"""Client channels: mutual TLS, a deadline on every call, errors rebuilt, patience with dependencies that come back."""

import json
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any, Final, TypeVar

import grpc
from opentelemetry.propagate import inject
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from services.common.config import TlsConfig
from services.common.errors import FedmeshError
from services.common.grpc.keepalive import client_keepalive
from services.common.grpc.server import MAX_MESSAGE_BYTES
from services.common.grpc.wire import from_rpc_error
from services.common.tls import channel_credentials

ResponseT = TypeVar("ResponseT")
StubT = TypeVar("StubT")

CHUNK_BYTES: Final = 1024 * 1024
DEFAULT_TIMEOUT_S: Final = 10.0

# gRPC's own retries cover a replica that went away in mid-connection; longer outages are covered by `patience_s`.
_SERVICE_CONFIG: Final = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "1s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
    }
)


class MeshChannel:
    """A channel to one service. Close it when done, or use it as an async context manager."""

    def __init__(self, target: str, tls: TlsConfig, *, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self.target = target
        self._channel = grpc.aio.secure_channel(
            target,
            channel_credentials(tls),
            options=[
                ("grpc.service_config", _SERVICE_CONFIG),
                ("grpc.enable_retries", 1),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.max_send_message_length", max_message_bytes),
                *client_keepalive(),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2_000),
                # 30 s by default: a rolling restart is over sooner, and would leave only addresses of pods that ended.
                ("grpc.dns_min_time_between_resolutions_ms", 1_000),
            ],
        )

    def stub(self, make: Callable[[grpc.aio.Channel], StubT]) -> StubT:
        """The generated stub of a service on this channel."""
        return make(self._channel)

    async def close(self) -> None:
        await self._channel.close()

    async def __aenter__(self) -> "MeshChannel":
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.close()


async def call(
    method: Callable[..., Any], request: Any, *, timeout_s: float = DEFAULT_TIMEOUT_S, patience_s: float = 0.0
) -> Any:
    """Make a call with one response. `request` is a message, or a function that makes the iterator of messages anew.

    timeout_s: deadline of each try. patience_s: how long retryable errors are retried (0: not at all); safe because
    every mutation carries an idempotency id.

    Raises: FedmeshError as the server raised it, or what the transport's status means.
    """
    async for attempt in _retrying(patience_s):
        with attempt:
            payload = request() if callable(request) else request
            under_way = method(payload, timeout=timeout_s, metadata=_trace_metadata())
            first = _FirstStatus(under_way) if callable(request) else None
            try:
                return await under_way
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(first.instead_of(error) if first else error) from None
    raise AssertionError("tenacity reraises")


async def stream(method: Callable[..., Any], request: Any, *, timeout_s: float | None = None) -> AsyncIterator[Any]:
    """Make a call with a stream of responses.

    Raises: FedmeshError as the server raised it, or what the transport's status means.
    """
    try:
        async for response in method(request, timeout=timeout_s, metadata=_trace_metadata()):
            yield response
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


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


def chunks(content: bytes) -> Iterable[bytes]:
    """Cut bytes into chunks of at most 1 MiB, in order."""
    return (content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES))


def _retrying(patience_s: float) -> AsyncRetrying:
    return AsyncRetrying(
        retry=retry_if_exception(lambda error: isinstance(error, FedmeshError) and error.retryable),
        stop=stop_after_delay(patience_s),
        wait=wait_exponential_jitter(initial=0.1, max=2.0, jitter=random.uniform(0.05, 0.2)),  # noqa: S311 - spreads load
        reraise=True,
    )


def _trace_metadata() -> tuple[tuple[str, str], ...]:
    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())
