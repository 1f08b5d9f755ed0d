"""The one server interceptor: identity, access, deadlines, errors, metrics, traces, for every call of every service."""

# The stubs make gRPC's types generic; the classes at run time are not.
from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache
from typing import Any, Final

import grpc
from cryptography.x509 import load_pem_x509_certificate
from opentelemetry.context import Context
from opentelemetry.propagate import extract, get_global_textmap
from opentelemetry.trace import SpanKind

from services.common.errors import Code, FedmeshError
from services.common.grpc.access import Rule
from services.common.grpc.admission import Admission
from services.common.grpc.certificates import note_peer
from services.common.grpc.messages import FirstMessages, decoding
from services.common.grpc.objective import FAILED
from services.common.grpc.wire import INTERNAL_TEXT, to_status
from services.common.identity import Identity, Kind, parse_identity
from services.common.people.person import Person, require_rights
from services.common.people.sign_in import SignIn
from services.common.refusal_book import REFUSALS, Refusal
from services.common.telemetry import CALLS, IN_FLIGHT, LATENCY, exemplar, get_logger
from services.common.tracing import fail_span, tracer

log = get_logger(__name__)

# A call with less time than this left is refused: its answer would come too late to be read.
HOPELESS_S: Final = 0.005
# The metadata that says which span is above; most calls come without.
_TRACE_FIELDS: Final = frozenset(get_global_textmap().fields)
_caller: ContextVar[Identity] = ContextVar("caller")


def caller() -> Identity:
    """The identity behind the call that is being answered."""
    return _caller.get()


@dataclass(frozen=True)
class Peer:
    """Who calls, and from when on its certificate is valid: a revocation names a moment.

    person: who signed in, where operators do.
    """

    identity: Identity
    certified_from: datetime
    person: Person | None = None


_peer: ContextVar[Peer] = ContextVar("peer")

Admit = Callable[[Peer], None]
"""Raises FedmeshError for a caller that is to be refused, whatever it asks."""

Refused = Callable[[Refusal], Awaitable[None]]
"""Told of every call that is refused for who makes it, before its caller is."""


class Gate(grpc.aio.ServerInterceptor):
    """Lets a call through only when TLS, certificate, policy, standing and deadline allow it, and maps every error.

    policy: rules by full method name. consortium: the only trust domain whose certificates are let in. admit: asked
    for every call and again for every message, so that a suspension ends what is under way. admission: bounds the calls
    in flight and their rate. message_s: seconds in which the first message of a call must come. sign_in: reads the
    token of an operator's call; without it, the certificate alone says who the operator is. refused: told of every call
    that ends because of who makes it, here or behind the gate.
    To gRPC every method takes a stream of messages, see `services.common.grpc.messages`.
    """

    def __init__(
        self,
        policy: Mapping[str, Rule],
        consortium: str,
        admit: Admit | None,
        admission: Admission,
        message_s: float,
        sign_in: SignIn | None = None,
        refused: Refused | None = None,
    ) -> None:
        self._messages = FirstMessages(message_s)
        self._answers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        self._sign_in = sign_in
        self._refused = refused
        self._policy = policy
        self._consortium = consortium
        # A failure that is the first of its kind is a change from 0, which a rate sees; from nothing it would not be.
        for method, rule in policy.items():
            if rule.objective:
                for code in (grpc.StatusCode.OK, *FAILED):
                    CALLS.labels(method, code.name, "yes")
        self._admit_caller = admit
        self._admission = admission

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        answers = self._answers.get(details.method)
        if answers is None:
            handler = await continuation(details)
            if handler is None:
                return None
            answers = self._answers[details.method] = self._guard(details.method, handler)
        return answers

    def _guard(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        codec = {
            "request_deserializer": decoding(handler.request_deserializer),
            "response_serializer": handler.response_serializer,
        }
        messages = handler.request_streaming
        if handler.response_streaming:
            stream = self._streaming(method, handler.stream_stream or handler.unary_stream, messages)
            return grpc.stream_stream_rpc_method_handler(stream, **codec)
        unary = self._single(method, handler.stream_unary or handler.unary_unary, messages)
        return grpc.stream_unary_rpc_method_handler(unary, **codec)

    def _single(self, method: str, behaviour: Any, messages: bool) -> Any:
        async def answer(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            with self._observed(method, context) as call:
                try:
                    with self._admission.entered(await self._admit(method, context, call, needs_deadline=True)):
                        request = self._stream(requests) if messages else await self._message(context, call)
                        return await behaviour(request, context)
                except Exception as error:
                    call["error"] = error
                    await self._note(method, call.get("caller"), error)
                    await abort(context, method, error)

        return answer

    def _streaming(self, method: str, behaviour: Any, messages: bool) -> Any:
        async def answer(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            with self._observed(method, context) as call:
                try:
                    with self._admission.entered(await self._admit(method, context, call, needs_deadline=False)):
                        request = self._stream(requests) if messages else await self._message(context, call)
                        async for response in self._guarded(behaviour(request, context)):
                            yield response
                except Exception as error:
                    call["error"] = error
                    await self._note(method, call.get("caller"), error)
                    await abort(context, method, error)

        return answer

    async def _message(self, context: grpc.aio.ServicerContext[Any, Any], call: dict[str, Any]) -> Any:
        """The one message of a call. Raises: FedmeshError, as `FirstMessages.only` and as for a message of a stream."""
        request = await self._messages.only(context)
        self._require_admitted(_peer.get())
        # How long its caller takes to send it says nothing of this server.
        call["began"] = time.perf_counter()
        return request

    def _stream(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        return self._guarded(self._messages.begun(requests))

    async def _note(self, method: str, who: Identity | None, error: Exception) -> None:
        if self._refused is not None and isinstance(error, FedmeshError) and error.code in REFUSALS:
            # `/package.Service/Method`, without the package.
            await self._refused(Refusal(who, method.rsplit(".", 1)[-1], error.code, error.message))

    async def _guarded(self, messages: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The messages, as long as their caller is admitted; then what makes them is closed."""
        try:
            async for message in messages:
                self._require_admitted(_peer.get())
                yield message
        finally:
            close = getattr(messages, "aclose", None)
            if close is not None:
                await close()

    def _require_admitted(self, peer: Peer) -> None:
        if peer.person is not None:
            peer.person.require_current()
        if self._admit_caller is not None:
            self._admit_caller(peer)

    async def _admit(
        self, method: str, context: grpc.aio.ServicerContext[Any, Any], call: dict[str, Any], *, needs_deadline: bool
    ) -> Identity:
        """Who calls; `caller` in `call` is who it is as far as that is known by then.

        Raises: FedmeshError for whoever is not let in.
        """
        rule = self._policy.get(method)
        # gRPC copies the whole certificate each time that it is asked.
        auth = context.auth_context()
        peer = read_peer(auth)
        identity = peer.identity
        call["caller"] = identity
        if identity.consortium != self._consortium:
            raise FedmeshError(Code.UNAUTHENTICATED, "the certificate belongs to another consortium")
        if rule is None or not rule.permits(identity):
            raise FedmeshError(
                Code.PERMISSION_DENIED, f"{identity.kind.value} {identity.name} may not call {method.rsplit('/', 1)[1]}"
            )
        person = await self._signed_in(rule, identity, context)
        if person is not None:
            call["caller"] = person.identity(self._consortium)
            require_rights(person, rule, method.rsplit("/", 1)[1])
            peer = replace(peer, person=person)
        self._require_admitted(peer)
        if identity.kind is Kind.HOSPITAL:
            note_peer(identity, auth)
        require_time(context, needs_deadline=needs_deadline)
        _caller.set(call["caller"])
        _peer.set(peer)
        return identity

    async def _signed_in(
        self, rule: Rule, identity: Identity, context: grpc.aio.ServicerContext[Any, Any]
    ) -> Person | None:
        """The person behind an operator's call, where people sign in."""
        if self._sign_in is None or identity.kind is not Kind.OPERATOR or not rule.roles:
            return None
        certificate = b"".join(context.auth_context()["x509_pem_cert"])
        return await self._sign_in.person(_authorization(context), certificate)

    def _observed(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        rule = self._policy.get(method)
        return observed(method, context, objective=rule is not None and rule.objective)


@contextmanager
def observed(method: str, context: grpc.aio.ServicerContext[Any, Any], *, objective: bool) -> Any:
    """Metrics and a span around the answer to a call.

    Into the dictionary go the error, as `error`, and when the time of the answer begins if not now, as `began`.
    """
    counts = "yes" if objective else "no"
    above = _span_above(context)
    started = time.perf_counter()
    call: dict[str, Any] = {}
    code = grpc.StatusCode.OK.name
    with (
        _in_flight(method).track_inprogress(),
        tracer().start_as_current_span(
            method,
            context=above,
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
            found = exemplar()
            _calls(method, code, counts).inc(exemplar=found)
            _latency(method, counts).observe(time.perf_counter() - call.get("began", started), found)


# Finding a metric by its labels takes longer than counting with it.
_in_flight: Final = lru_cache(maxsize=None)(IN_FLIGHT.labels)
_calls: Final = lru_cache(maxsize=None)(CALLS.labels)
_latency: Final = lru_cache(maxsize=None)(LATENCY.labels)


def _span_above(context: grpc.aio.ServicerContext[Any, Any]) -> Context:
    """The caller's span, as the call's metadata names it; a context without one for a caller that names none."""
    carrier = {
        key: value
        for key, value in context.invocation_metadata() or ()
        if key in _TRACE_FIELDS and isinstance(value, str)
    }
    return extract(carrier) if carrier else Context()


def require_time(context: grpc.aio.ServicerContext[Any, Any], *, needs_deadline: bool) -> None:
    """Raises: FedmeshError(INVALID_ARGUMENT) without a deadline that is needed, (DEADLINE_EXCEEDED) close to it."""
    remaining = context.time_remaining()
    if needs_deadline and remaining is None:
        raise FedmeshError(Code.INVALID_ARGUMENT, "the call has no deadline: set one")
    if remaining is not None and remaining < HOPELESS_S:
        raise FedmeshError(Code.DEADLINE_EXCEEDED, "too little time is left to answer this call")


def require_tls13(auth: Mapping[str, Iterable[bytes]]) -> None:
    """Raises: FedmeshError(UNAUTHENTICATED)."""
    if b"".join(auth.get("ssl_tls_version", ())) != b"TLSv1.3":
        # gRPC's Python API cannot set a minimum version; so it is enforced here, before any handler sees the call.
        raise FedmeshError(Code.UNAUTHENTICATED, "TLS 1.3 is required")


def read_peer(auth: Mapping[str, Iterable[bytes]]) -> Peer:
    """Who the peer's verified certificate says it is. auth: what gRPC knows of the connection.

    Raises: FedmeshError(UNAUTHENTICATED) without a certificate, with a name that is not fedmesh's, or below TLS 1.3.
    """
    require_tls13(auth)
    uris = auth.get("peer_spiffe_id", ()) or [
        name for name in auth.get("x509_subject_alternative_name", ()) if name.startswith(b"spiffe://")
    ]
    names = list(uris)
    if len(names) != 1:
        raise FedmeshError(Code.UNAUTHENTICATED, "the client certificate has no single fedmesh identity")
    return _named(names[0], b"".join(auth["x509_pem_cert"]))


# A connection comes with the same bytes at every call: they are read once, and those of another certificate are others.
@lru_cache(maxsize=1024)
def _named(uri: bytes, pem: bytes) -> Peer:
    """Whom a verified certificate names. Raises: FedmeshError(UNAUTHENTICATED) for no identity of fedmesh's."""
    return Peer(parse_identity(uri.decode("utf-8", "replace")), load_pem_x509_certificate(pem).not_valid_before_utc)


def _authorization(context: grpc.aio.ServicerContext[Any, Any]) -> list[str]:
    """Every `authorization` of a call: more than one is for the reader to refuse."""
    return [str(value) for key, value in context.invocation_metadata() or () if key == "authorization"]


async def abort(context: grpc.aio.ServicerContext[Any, Any], method: str, error: Exception) -> None:
    """End a call with the status that an error stands for."""
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
