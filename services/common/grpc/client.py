"""Client channels: mutual TLS, a deadline on every call, errors rebuilt, patience with dependencies that come back."""

import json
import random
from collections.abc import AsyncIterator, Callable, Iterable
from typing import Any, Final, TypeVar

import grpc
from opentelemetry.propagate import inject
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from services.common.config import TlsConfig
from services.common.errors import FedmeshError
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
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.min_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 2_000),
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
            try:
                return await method(payload, timeout=timeout_s, metadata=_trace_metadata())
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None
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
