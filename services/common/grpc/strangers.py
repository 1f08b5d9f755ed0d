"""The one kind of listener that asks for no client certificate: server-only TLS 1.3 for whoever has none yet.

It serves little and slowly: a small message limit, few calls at once, and a rate for each address and for all together.
"""

# The stubs make gRPC's types generic; the classes at run time are not.
from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import grpc
from pydantic import Field

from services.common.config import Address, Section, TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.access import load_stranger_methods
from services.common.grpc.buckets import Buckets
from services.common.grpc.gate import abort, observed, require_time, require_tls13
from services.common.grpc.messages import FirstMessages, decoding
from services.common.grpc.server import Endpoint, bind
from services.common.tasks import until_cancelled
from services.common.telemetry import get_logger
from services.common.tls import server_credentials

log = get_logger(__name__)

_MESSAGE_BYTES: Final = 16 * 1024
_AGE_MS: Final = 30_000
# An address in its burst holds no more calls open than that for so long, and few for ever.
_MESSAGE_S: Final = 10.0


class StrangersConfig(Section):
    listen: Address = Field(description="host:port of the listener that asks for no client certificate")
    per_minute: float = Field(default=6.0, gt=0, le=6000, description="calls a minute that one address may make")
    burst: int = Field(default=6, ge=1, le=1000, description="calls that one address may make at once")
    all_per_minute: float = Field(default=120.0, gt=0, le=60_000, description="calls a minute from all addresses")


class Rate:
    """Token buckets, one for each of the addresses that were seen last, and one for all together."""

    def __init__(self, config: StrangersConfig, now: Callable[[], float] = time.monotonic) -> None:
        self.addresses: Buckets[str] = Buckets(config.per_minute / 60, config.burst, now)
        self._everybody: Buckets[None] = Buckets(config.all_per_minute / 60, config.all_per_minute, now)

    def take(self, address: str) -> None:
        """Raises: FedmeshError(RATE_LIMITED)."""
        # Somebody who is over its own rate takes nothing from the others.
        if not (self.addresses.take(address) and self._everybody.take(None)):
            raise FedmeshError(Code.RATE_LIMITED, "too many tries: wait a minute, then try again")


class _Door(grpc.aio.ServerInterceptor):
    """TLS 1.3, the rate, a deadline; then the message and the method, with its errors mapped as everywhere."""

    def __init__(self, methods: frozenset[str], rate: Rate) -> None:
        self._methods = methods
        self._rate = rate
        self._messages = FirstMessages(_MESSAGE_S)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(details)
        if handler is None or details.method not in self._methods:
            return None
        behaviour: Any = handler.unary_unary

        async def answer(_requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with observed(details.method, context, objective=False) as call:
                try:
                    require_tls13(context.auth_context())
                    self._rate.take(context.peer().rsplit(":", 1)[0])
                    require_time(context, needs_deadline=True)
                    return await behaviour(await self._messages.only(context), context)
                except Exception as error:
                    call["error"] = error
                    await abort(context, details.method, error)

        return grpc.stream_unary_rpc_method_handler(
            answer,
            request_deserializer=decoding(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class StrangersServer:
    """Serves the methods whose policy is CALLER_STRANGER, and nothing else, not even health."""

    def __init__(self, config: StrangersConfig, tls: TlsConfig, endpoint: Endpoint, drain_s: float) -> None:
        self._config = config
        self._tls = tls
        self._drain_s = drain_s
        door = _Door(load_stranger_methods(endpoint.descriptor), Rate(config))
        options = [
            ("grpc.max_receive_message_length", _MESSAGE_BYTES),
            ("grpc.max_metadata_size", 8192),
            ("grpc.max_concurrent_streams", 4),
            ("grpc.max_connection_age_ms", _AGE_MS),
            ("grpc.max_connection_age_grace_ms", 10_000),
            ("grpc.max_connection_idle_ms", 10_000),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.so_reuseport", 0),
        ]
        self._server = grpc.aio.server(interceptors=[door], options=options, maximum_concurrent_rpcs=32)
        endpoint.add_to_server(endpoint.servicer, self._server)
        self.port = 0

    async def start(self) -> None:
        """Raises: FedmeshError(CONFIG_INVALID) when the address cannot be bound."""
        credentials = server_credentials(self._tls, ask_clients=False)
        self.port = bind(self._config.listen, lambda: self._server.add_secure_port(self._config.listen, credentials))
        await self._server.start()
        log.info("listening_for_strangers", address=self._config.listen, port=self.port)

    async def stop(self) -> None:
        await self._server.stop(self._drain_s)

    async def run(self) -> None:
        """Serve until cancelled. Raises: as `start`."""
        await self.start()
        try:
            await until_cancelled()
        finally:
            await self.stop()
