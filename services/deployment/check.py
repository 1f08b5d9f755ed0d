"""Calls every service the way its clients do: by its name, over mutual TLS."""

import asyncio
import time
from collections.abc import Callable
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, named_server
from services.deployment.config import CheckConfig, CheckedService

_TIMEOUT_S: Final = 5.0
_PAUSE_S: Final = 1.0


async def check_services(config: CheckConfig, report: Callable[[str], None]) -> None:
    """Ask each service whether it serves, and see that it refuses whoever has no certificate. Reports a line for each.

    Raises: FedmeshError(SERVICE_UNAVAILABLE) naming all services that failed; (CONFIG_INVALID) for the certificate.
    """
    failed = []
    for name, checked in config.services.items():
        try:
            await check_service(config, checked)
        except FedmeshError as error:
            failed.append(name)
            report(f"FAILED {name} at {checked.target}: {error}")
        else:
            report(f"OK     {name} at {checked.target}: serves over mutual TLS, refuses callers without a certificate")
    if failed:
        raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"not in order: {', '.join(failed)}")


async def check_service(config: CheckConfig, checked: CheckedService) -> None:
    """As `check_services`, for one service and without a word. Raises: FedmeshError."""
    await _serves(config, checked)
    await _refuses_strangers(config, checked)


async def _serves(config: CheckConfig, checked: CheckedService) -> None:
    request = health_pb2.HealthCheckRequest(service=checked.service)
    async with MeshChannel(checked.target, config.tls, server_name=checked.server_name) as channel:
        stub = channel.stub(health_pb2_grpc.HealthStub)
        ending = time.monotonic() + config.patience_s
        while True:
            left_s = max(0.0, ending - time.monotonic())
            answer = await call(stub.Check, request, timeout_s=_TIMEOUT_S, patience_s=left_s)
            if answer.status == health_pb2.HealthCheckResponse.SERVING:
                return
            if time.monotonic() >= ending:
                raise FedmeshError(Code.SERVICE_UNAVAILABLE, "it answers that it does not serve: see its log")
            await asyncio.sleep(_PAUSE_S)


async def _refuses_strangers(config: CheckConfig, checked: CheckedService) -> None:
    credentials = grpc.ssl_channel_credentials(config.tls.ca.read_bytes())
    options = named_server(checked.server_name)
    async with grpc.aio.secure_channel(checked.target, credentials, options=options) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                return
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, f"a stranger got {error.code().name}") from None
    raise FedmeshError(Code.PERMISSION_DENIED, "it answers callers without a certificate")
