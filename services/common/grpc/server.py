"""Builds and runs the mTLS server of a service, and drains it when the process is told to stop."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from services.common.config import LimitsConfig, ServerConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.access import load_policy
from services.common.grpc.admission import Admission
from services.common.grpc.certificates import note_own
from services.common.grpc.gate import Admit, Gate, Refused
from services.common.grpc.keepalive import server_keepalive
from services.common.people.sign_in import SignIn
from services.common.refusals import RefusalLog
from services.common.tasks import end_tasks
from services.common.telemetry import SERVING, get_logger
from services.common.tls import load_tls, server_credentials

log = get_logger(__name__)

# Large payloads travel in 1 MiB chunks; the rest of the room is for the message around the chunk.
MAX_MESSAGE_BYTES: Final = 1024 * 1024 + 64 * 1024
# What may be sent of a stream before it is read, whoever sends: enough for 40 Mbit/s on a line of 100 ms.
_UNREAD_BYTES: Final = 512 << 10
# The registry keeps a record of up to 4 MiB for the coordinator in one message.
MAX_RECORD_BYTES: Final = 4 * 1024 * 1024 + MAX_MESSAGE_BYTES
# Calls on one connection beyond those that one caller may have in flight: being refused, or cancelled.
_SPARE_STREAMS: Final = 256
_HEALTH_CHECK_S: Final = 2.0
# Health service name that means "this process answers". The empty name and the services' own mean "ready for calls":
# they say NOT_SERVING while a store is away, which a restart would not mend.
LIVE: Final = "live"


@dataclass(frozen=True)
class Endpoint:
    """One gRPC service of a server: its descriptor, the generated function that adds it, and its implementation."""

    descriptor: ServiceDescriptor
    add_to_server: Callable[[Any, Any], None]
    servicer: object


class MeshServer:
    """A gRPC server with mutual TLS, health, reflection and graceful stop. admit, refused: see `Gate`."""

    def __init__(
        self,
        config: ServerConfig,
        endpoints: Sequence[Endpoint],
        *,
        admit: Admit | None = None,
        refused: Refused | None = None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
    ) -> None:
        self._config = config
        material = load_tls(config.tls)
        note_own(material)
        self._process = material.identity.name
        policy = load_policy(endpoint.descriptor for endpoint in endpoints)
        options = [
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", max_message_bytes),
            *bounded_read_ahead(),
            ("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(config.drain_s * 1000) or 1),
            *server_keepalive(),
            *_limits(config.limits),
            # Two processes must never share a port by accident; replicas have their own addresses.
            ("grpc.so_reuseport", 0),
        ]
        sign_in = SignIn(config.people) if config.people else None
        if sign_in is None and any(rule.roles for rule in policy.values()):
            log.warning("operators_need_no_sign_in", advice="set server.people: see docs/people.md")
        admission = Admission(config.limits)
        gate = Gate(policy, material.identity.consortium, admit, admission, config.limits.message_s, sign_in, refused)
        self._server = grpc.aio.server(interceptors=[gate], options=options)
        for endpoint in endpoints:
            endpoint.add_to_server(endpoint.servicer, self._server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = [endpoint.descriptor.full_name for endpoint in endpoints]
        reflection.enable_server_reflection((*self._names, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._probe = self._build_probe(options) if config.health_listen else None
        self._port = 0

    @property
    def port(self) -> int:
        """The port that is listened on, known after `start`."""
        return self._port

    def _build_probe(self, options: list[tuple[str, int]]) -> grpc.aio.Server:
        probe = grpc.aio.server(options=options)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, probe)
        return probe

    async def start(self) -> None:
        """Listen.

        Raises: FedmeshError(CONFIG_INVALID) when an address cannot be bound.
        """
        self._port = bind(
            self._config.listen,
            lambda: self._server.add_secure_port(self._config.listen, server_credentials(self._config.tls)),
        )
        await self._server.start()
        if self._probe is not None and self._config.health_listen is not None:
            address = self._config.health_listen
            probe = self._probe
            bind(address, lambda: probe.add_insecure_port(address))
            await probe.start()
        await self._health.set(LIVE, health_pb2.HealthCheckResponse.SERVING)
        await self.set_serving(True)
        log.info("listening", address=self._config.listen, port=self._port)

    async def set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", *self._names):
            await self._health.set(name, status)
        SERVING.labels(self._process).set(serving)

    async def watch_health(self, dependencies: Callable[[], Awaitable[bool]]) -> None:
        """Keep the health answer true: NOT_SERVING while a store is away or the certificate is out of date."""
        while True:
            serving = await dependencies() and self._certificate_valid()
            await self.set_serving(serving)
            await asyncio.sleep(_HEALTH_CHECK_S)

    def _certificate_valid(self) -> bool:
        try:
            material = load_tls(self._config.tls)
        except FedmeshError:
            return False
        note_own(material)
        return material.not_after > datetime.now(UTC)

    async def stop(self) -> None:
        """Say NOT_SERVING, let calls in flight finish within the drain time, then close."""
        await self._health.enter_graceful_shutdown()
        SERVING.labels(self._process).set(0)
        await self._server.stop(self._config.drain_s)
        if self._probe is not None:
            await self._probe.stop(0)


def _limits(limits: LimitsConfig) -> list[tuple[str, int]]:
    """gRPC's options for what is refused before a call is one."""
    return [
        # Between the soft and the hard limit calls are refused at random: one limit for all is clearer. A token has at
        # most 8 KiB, which the default has room for, beside a trace.
        ("grpc.max_metadata_size", limits.metadata_bytes),
        ("grpc.absolute_max_metadata_size", limits.metadata_bytes),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        ("grpc.max_allowed_incoming_connections", limits.connections),
        # At this limit gRPC resets calls that its own clients make, so it is above what the gate lets one caller have:
        # who does not wait for the gate's answers meets it.
        ("grpc.max_concurrent_streams", limits.calls_of_one + _SPARE_STREAMS),
    ]


def bind(address: str, add: Callable[[], int]) -> int:
    """Add a port to a server. Raises: FedmeshError(CONFIG_INVALID)."""
    try:
        port = add()
    except RuntimeError as error:
        raise FedmeshError(
            Code.CONFIG_INVALID, f"cannot listen on {address}: is the port taken or the address foreign?"
        ) from error
    if port == 0:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot listen on {address}: is the port taken?")
    return port


async def always_ready() -> bool:
    return True


async def run_server(
    config: ServerConfig,
    endpoints: Sequence[Endpoint],
    *,
    background: Sequence[Callable[[], Awaitable[None]]] = (),
    dependencies: Callable[[], Awaitable[bool]] = always_ready,
    admit: Admit | None = None,
    refusals: RefusalLog,
    max_message_bytes: int = MAX_MESSAGE_BYTES,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain. `background` loops run beside the server; if one fails, all stops.

    admit: refuses callers, see `Gate`. refusals: tells the audit log of refused callers. max_message_bytes: largest
    message either way.

    Raises: FedmeshError(CONFIG_INVALID) for addresses or certificates; whatever a background loop raised.
    """
    server = MeshServer(config, endpoints, admit=admit, refused=refusals.note, max_message_bytes=max_message_bytes)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    await server.start()
    if config.metrics_listen is not None:
        start_metrics(config.metrics_listen)
    tasks = [asyncio.ensure_future(run()) for run in background]
    telling = asyncio.ensure_future(refusals.run())
    tasks.append(asyncio.ensure_future(server.watch_health(dependencies)))
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait([stopped, telling, *tasks], return_when=asyncio.FIRST_COMPLETED)
        log.info("draining", seconds=config.drain_s)
        await server.stop()
    finally:
        # While what it tells the audit log through still runs.
        await end_tasks([telling])
        await _finish([*tasks, telling, stopped])


async def _finish(tasks: Sequence["asyncio.Future[Any]"]) -> None:
    failed = [task.exception() for task in tasks if task.done() and not task.cancelled() and task.exception()]
    # Loops end their own tasks within a second or two; their clean-up is not to be cut short.
    await end_tasks(tasks, again_s=5.0)
    for error in failed:
        if error is not None:
            raise error


def start_metrics(address: str) -> None:
    """Serve Prometheus metrics at `http://address/metrics`.

    Raises: FedmeshError(CONFIG_INVALID) when the address cannot be bound.
    """
    host, port = address.rsplit(":", 1)
    try:
        start_http_server(int(port), host)
    except OSError as error:
        raise FedmeshError(Code.CONFIG_INVALID, f"cannot listen on {address} for metrics: {error.strerror}") from error


def bounded_read_ahead() -> list[tuple[str, int]]:
    """Options of both ends: a sender keeps in memory what its peer lets it send, for every stream.

    Left to itself, gRPC lets ever more of a fast stream come before anybody reads it.
    """
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", _UNREAD_BYTES)]
