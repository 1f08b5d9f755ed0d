"""The one server interceptor: identity, access, deadlines, errors, metrics, traces, for every call of every service."""

# The stubs make gRPC's types generic; the classes at run time are not.
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final

import grpc
from opentelemetry.propagate import extract
from opentelemetry.trace import SpanKind

from services.common.errors import Code, FedmeshError
from services.common.grpc.access import Rule
from services.common.grpc.certificates import note_peer
from services.common.grpc.objective import FAILED
from services.common.grpc.wire import INTERNAL_TEXT, to_status
from services.common.identity import Identity, parse_identity
from services.common.telemetry import CALLS, IN_FLIGHT, LATENCY, exemplar, get_logger
from services.common.tracing import fail_span, tracer

log = get_logger(__name__)

# A call with less time than this left is refused: its answer would come too late to be read.
HOPELESS_S: Final = 0.005
_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """The identity behind the call that is being answered."""
    return _caller.get()


Admit = Callable[[Identity], None]
"""Raises FedmeshError for a caller that is to be refused, whatever it asks."""


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through only when TLS, certificate, policy, standing and deadline allow it, and maps every error.

    policy: rules by full method name. consortium: the only trust domain whose certificates are let in. admit: asked
    for every call and again for every message of a stream, so that a suspension ends what is under way.
    """

    def __init__(self, policy: Mapping[str, Rule], consortium: str, admit: Admit | None = None) -> None:
        self._policy = policy
        self._consortium = consortium
        # A failure that is the first of its kind is a change from 0, which a rate sees; from nothing it would not be.
        for method, rule in policy.items():
            if rule.objective:
                for code in (grpc.StatusCode.OK, *FAILED):
                    CALLS.labels(method, code.name, "yes")
        self._admit_caller = admit

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(details)
        if handler is None:
            return None
        method = details.method
        codec = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        messages = handler.request_streaming
        if handler.response_streaming:
            stream = self._streaming(method, handler.stream_stream or handler.unary_stream, messages)
            make = grpc.stream_stream_rpc_method_handler if messages else grpc.unary_stream_rpc_method_handler
            return make(stream, **codec)
        unary = self._single(method, handler.stream_unary or handler.unary_unary, messages)
        make_unary = grpc.stream_unary_rpc_method_handler if messages else grpc.unary_unary_rpc_method_handler
        return make_unary(unary, **codec)

    def _single(self, method: str, behaviour: Any, messages: bool) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._observed(method, context) as call:
                try:
                    self._admit(method, context, needs_deadline=True)
                    return await behaviour(self._guarded(request) if messages else request, context)
                except Exception as error:
                    call["error"] = error
                    await _abort(context, method, error)

        return answer

    def _streaming(self, method: str, behaviour: Any, messages: bool) -> Any:
        async def answer(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._observed(method, context) as call:
                try:
                    self._admit(method, context, needs_deadline=False)
                    responses = behaviour(self._guarded(request) if messages else request, context)
                    async for response in self._guarded(responses):
                        yield response
                except Exception as error:
                    call["error"] = error
                    await _abort(context, method, error)

        return answer

    async def _guarded(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages, as long as their caller is admitted; then what makes them is closed."""
        try:
            async for message in messages:
                self._require_admitted(caller())
                yield message
        finally:
            close = getattr(messages, "aclose", None)
            if close is not None:
                await close()

    def _require_admitted(self, identity: Identity) -> None:
        if self._admit_caller is not None:
            self._admit_caller(identity)

    def _admit(self, method: str, context: grpc.aio.ServicerContext[Any, Any], *, needs_deadline: bool) -> None:
        rule = self._policy.get(method)
        identity = peer_identity(context)
        if identity.consortium != self._consortium:
            raise FedmeshError(Code.UNAUTHENTICATED, "the certificate belongs to another consortium")
        if rule is None or not rule.permits(identity):
            raise FedmeshError(
                Code.PERMISSION_DENIED, f"{identity.kind.value} {identity.name} may not call {method.rsplit('/', 1)[1]}"
            )
        self._require_admitted(identity)
        note_peer(identity, context.auth_context())
        remaining = context.time_remaining()
        if needs_deadline and remaining is None:
            raise FedmeshError(Code.INVALID_ARGUMENT, "the call has no deadline: set one")
        if remaining is not None and remaining < HOPELESS_S:
            raise FedmeshError(Code.DEADLINE_EXCEEDED, "too little time is left to answer this call")
        _caller.set(identity)

    @contextmanager
    def _observed(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        rule = self._policy.get(method)
        objective = "yes" if rule is not None and rule.objective else "no"
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        started = time.perf_counter()
        call: dict[str, Exception] = {}
        code = grpc.StatusCode.OK.name
        with (
            IN_FLIGHT.labels(method).track_inprogress(),
            tracer().start_as_current_span(
                method,
                context=extract(carrier),
                kind=SpanKind.SERVER,
                record_exception=False,
                set_status_on_exception=False,
            ) as span,
        ):
            try:
                yield call
            except asyncio.CancelledError:
                code = grpc.StatusCode.CANCELLED.name
                raise
            finally:
                error = call.get("error")
                if error is not None:
                    fedmesh = error if isinstance(error, FedmeshError) else FedmeshError(Code.INTERNAL, INTERNAL_TEXT)
                    code = to_status(fedmesh)[0].name
                    fail_span(span, fedmesh)
                span.set_attribute("rpc.grpc.code", code)
                CALLS.labels(method, code, objective).inc(exemplar=exemplar())
                LATENCY.labels(method, objective).observe(time.perf_counter() - started, exemplar())


def peer_identity(context: grpc.aio.ServicerContext[Any, Any]) -> Identity:
    """The identity in the peer's verified certificate.

    Raises: FedmeshError(UNAUTHENTICATED) without a certificate, with a name that is not fedmesh's, or below TLS 1.3.
    """
    auth = context.auth_context()
    version = b"".join(auth.get("ssl_tls_version", ()))
    if version != b"TLSv1.3":
        # gRPC's Python API cannot set a minimum version; so it is enforced here, before any handler sees the call.
        raise FedmeshError(Code.UNAUTHENTICATED, "TLS 1.3 is required")
    uris = auth.get("peer_spiffe_id", ()) or [
        name for name in auth.get("x509_subject_alternative_name", ()) if name.startswith(b"spiffe://")
    ]
    names = list(uris)
    if len(names) != 1:
        raise FedmeshError(Code.UNAUTHENTICATED, "the client certificate has no single fedmesh identity")
    return parse_identity(names[0].decode("utf-8", "replace"))


async def _abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> None:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    if isinstance(error, FedmeshError):
        known = error
        log.info("call_refused", method=method, code=error.code.value, reason=error.message)
    else:
        known = FedmeshError(Code.INTERNAL, INTERNAL_TEXT)
        log.error("call_failed", method=method, exc_info=error)
    status, message, trailing = to_status(known)
    await context.abort(status, message, trailing)
