"""The gRPC side of the node: calls to registry, coordinator and aggregator."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import aclosing
from typing import IO, Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2 as aggregator_pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as aggregator_rpc
from fedmesh.coordinator.v1 import coordinator_pb2 as coordinator_pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as coordinator_rpc
from fedmesh.registry.v1 import promotion_pb2 as promotion_pb
from fedmesh.registry.v1 import promotion_pb2_grpc as promotion_rpc
from fedmesh.registry.v1 import registry_pb2 as registry_pb
from fedmesh.registry.v1 import registry_pb2_grpc as registry_rpc
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import PART_BYTES, MeshChannel, call, chunks, stream
from services.hospital_node.config import LimitsConfig
from services.hospital_node.domain.ports import EpochFacts, JobFacts, LedgerStanding, RosterFacts, Seen
from services.hospital_node.domain.sums import MaskedUpload
from services.hospital_node.domain.tasks import AttemptId, Task
from services.hospital_node.wire import (
    parse_signed,
    parse_standing,
    parse_task,
    wire_attempt,
    wire_form,
    wire_signed,
)
from services.privacy.chain import Entry, Head
from services.secure_sum.sealed import OVERHEAD_BYTES
from services.secure_sum.statements import Signed

# Request ids are derived from what is asked, so that a repetition, even after a restart, carries the same id.
_REQUESTS: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://fedmesh/hospital-node/requests")
_REASON_LENGTH: Final = 500
_OVER: Final = frozenset(
    {registry_pb.JOB_STATUS_COMPLETED, registry_pb.JOB_STATUS_FAILED, registry_pb.JOB_STATUS_CANCELLED}
)


class GrpcMesh:
    """See `domain.ports.Mesh` for the contract."""

    def __init__(
        self,
        hospital_id: str,
        fingerprint: Callable[[], str],
        registry: MeshChannel,
        coordinator: MeshChannel,
        aggregator: MeshChannel,
        limits: LimitsConfig,
    ) -> None:
        self._hospital_id = hospital_id
        self._fingerprint = fingerprint
        self._registry = registry.stub(registry_rpc.RegistryServiceStub)
        self._promotion = registry.stub(promotion_rpc.PromotionServiceStub)
        self._coordinator = coordinator.stub(coordinator_rpc.CoordinatorServiceStub)
        self._aggregator = aggregator.stub(aggregator_rpc.AggregatorServiceStub)
        self._limits = limits

    async def watch(self, cursor: str) -> AsyncIterator[tuple[str, Task | None]]:
        request = coordinator_pb.WatchTasksRequest(cursor=cursor, group_key_fingerprint=self._fingerprint())
        async with aclosing(stream(self._coordinator.WatchTasks, request)) as responses:  # type: ignore[type-var]
            while True:
                try:
                    async with asyncio.timeout(self._limits.heartbeat_timeout_s):
                        response = await anext(responses)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the task stream fell silent") from None
                yield response.cursor, parse_task(response.task) if response.HasField("task") else None

    async def get_plan(self, plan_id: str, patience_s: float) -> bytes:
        request = registry_pb.GetPlanRequest(plan_id=plan_id)
        response = await self._call(self._registry.GetPlan, request, patience_s)
        return bytes(response.plan.manifest)

    async def get_job(self, job_id: str, patience_s: float) -> JobFacts:
        request = registry_pb.GetJobRequest(job_id=job_id)
        job = (await self._call(self._registry.GetJob, request, patience_s)).job
        over = job.status in _OVER
        return JobFacts(job.plan_id, tuple(job.hospital_ids), job.rounds, job.roster_sha256, over)

    async def list_rosters(self, after_version: int, patience_s: float) -> list[RosterFacts]:
        request = registry_pb.ListRostersRequest(after_version=after_version)
        found = await self._call(self._registry.ListRosters, request, patience_s)
        return [
            RosterFacts(roster.statement, {item.hospital_id: item.signature for item in roster.signatures})
            for roster in found.rosters
        ]

    async def get_epoch(self, roster_sha256: str, epoch: int, patience_s: float) -> EpochFacts:
        request = registry_pb.GetEpochRequest(roster_sha256=roster_sha256, epoch=epoch)
        found = await self._call(self._registry.GetEpoch, request, patience_s)
        signed = parse_signed(found.epoch) if found.HasField("epoch") else None
        barred = tuple(found.barred)
        return EpochFacts(signed, found.due, found.due_for_s, found.roster_sha256, barred, found.public_key)

    async def publish_epoch(self, epoch: Signed, patience_s: float) -> Signed:
        request = registry_pb.PublishEpochRequest(
            request_id=self._request_id("epoch", epoch.sha256), epoch=wire_signed(epoch)
        )
        return parse_signed((await self._call(self._registry.PublishEpoch, request, patience_s)).epoch)

    async def download_blob(self, sha256: str, patience_s: float) -> bytes:
        request = registry_pb.DownloadBlobRequest(sha256=sha256)
        limit = self._limits.max_state_mb * 1024 * 1024 + OVERHEAD_BYTES
        content = bytearray()

        def take(response: Any) -> int:
            content.extend(response.chunk)
            return len(response.chunk)

        await self._download(self._registry.DownloadBlob, request, limit, patience_s, content.clear, take)
        return bytes(content)

    async def upload_blob(self, job_id: str, sha256: str, content: bytes, patience_s: float) -> None:
        header = registry_pb.BlobHeader(
            request_id=self._request_id("blob", job_id, sha256), job_id=job_id, sha256=sha256, size_bytes=len(content)
        )

        def messages() -> Iterable[registry_pb.UploadBlobRequest]:
            yield registry_pb.UploadBlobRequest(header=header)
            for chunk in chunks(content):
                yield registry_pb.UploadBlobRequest(chunk=chunk)

        await self._transfer(self._registry.UploadBlob, messages, patience_s)

    async def upload(self, upload: MaskedUpload, patience_s: float) -> None:
        header = aggregator_pb.UploadHeader(
            request_id=self._request_id("upload", upload.attempt, upload.ciphertext_sha256),
            attempt=wire_attempt(upload.attempt),
            form=wire_form(upload.layout),
            size_bytes=upload.layout.upload_bytes,
            ciphertext_sha256=upload.ciphertext_sha256,
            upload=wire_signed(upload.signed),
        )

        def messages() -> Iterable[aggregator_pb.UploadRequest]:
            yield aggregator_pb.UploadRequest(header=header)
            for segment in upload.segments():
                *beginning, rest = chunks(segment, PART_BYTES)
                for part in beginning:
                    yield aggregator_pb.UploadRequest(beginning=part)
                yield aggregator_pb.UploadRequest(chunk=rest)

        await self._transfer(self._aggregator.Upload, messages, patience_s)

    async def get_segments(self, attempt: AttemptId, index: int, size: int, patience_s: float) -> dict[str, bytes]:
        request = aggregator_pb.GetSegmentsRequest(attempt=wire_attempt(attempt), index=index, in_parts=True)
        found: dict[str, bytearray] = {}

        def take(response: Any) -> int:
            for item in response.segments:
                found.setdefault(item.hospital_id, bytearray()).extend(item.segment)
            # Names and all: an answer of nothing but names ends as well.
            return int(response.ByteSize())

        await self._download(self._aggregator.GetSegments, request, size, patience_s, found.clear, take)
        return {name: bytes(segment) for name, segment in found.items()}

    async def download_sum(self, attempt: AttemptId, into: IO[bytes], size: int, patience_s: float) -> str:
        request = aggregator_pb.DownloadSumRequest(attempt=wire_attempt(attempt))
        digest = hashlib.sha256()

        def restart() -> None:
            nonlocal digest
            into.seek(0)
            into.truncate()
            digest = hashlib.sha256()

        def take(response: Any) -> int:
            digest.update(response.chunk)
            return into.write(response.chunk)

        await self._download(self._aggregator.DownloadSum, request, size, patience_s, restart, take)
        return digest.hexdigest()

    async def report_ready(self, attempt: AttemptId, base_version: int, advert: Signed, patience_s: float) -> None:
        request = coordinator_pb.ReportReadyRequest(
            request_id=self._request_id("ready", attempt, advert.sha256),
            attempt=wire_attempt(attempt),
            base_version=base_version,
            advert=wire_signed(advert),
        )
        await self._call(self._coordinator.ReportReady, request, patience_s)

    async def submit_shares(self, attempt: AttemptId, shares: Sequence[Signed], patience_s: float) -> None:
        request = coordinator_pb.SubmitSharesRequest(
            request_id=self._request_id("shares", attempt, *(share.sha256 for share in shares)),
            attempt=wire_attempt(attempt),
            shares=[wire_signed(share) for share in shares],
        )
        await self._call(self._coordinator.SubmitShares, request, patience_s)

    async def report_upload(self, upload: MaskedUpload, patience_s: float) -> None:
        request = coordinator_pb.ReportUploadRequest(
            request_id=self._request_id("report-upload", upload.attempt, upload.ciphertext_sha256),
            attempt=wire_attempt(upload.attempt),
            ciphertext_sha256=upload.ciphertext_sha256,
            size_bytes=upload.layout.upload_bytes,
            upload=wire_signed(upload.signed),
        )
        await self._call(self._coordinator.ReportUpload, request, patience_s)

    async def confirm(self, attempt: AttemptId, survivors: bytes, signature: bytes, patience_s: float) -> None:
        sha256 = hashlib.sha256(survivors).hexdigest()
        request = coordinator_pb.ConfirmSurvivorsRequest(
            request_id=self._request_id("confirm", attempt, sha256),
            attempt=wire_attempt(attempt),
            survivors_sha256=sha256,
            signature=signature,
        )
        await self._call(self._coordinator.ConfirmSurvivors, request, patience_s)

    async def submit_reveal(self, attempt: AttemptId, reveal: Signed, patience_s: float) -> None:
        request = coordinator_pb.SubmitRevealRequest(
            request_id=self._request_id("reveal", attempt, reveal.sha256),
            attempt=wire_attempt(attempt),
            reveal=wire_signed(reveal),
        )
        await self._call(self._coordinator.SubmitReveal, request, patience_s)

    async def submit_digest(self, attempt: AttemptId, seen: Seen, patience_s: float) -> None:
        request = coordinator_pb.SubmitDigestRequest(
            request_id=self._request_id("digest", attempt, seen.signed.sha256, seen.metrics_json),
            attempt=wire_attempt(attempt),
            sum_sha256=seen.sum_sha256,
            digest=seen.digest,
            signed=wire_signed(seen.signed),
            next_state_sha256=seen.next_state_sha256,
            metrics_json=seen.metrics_json,
        )
        await self._call(self._coordinator.SubmitDigest, request, patience_s)

    async def submit_state(self, attempt: AttemptId, sha256: str, metrics_json: str, patience_s: float) -> None:
        request = coordinator_pb.SubmitStateRequest(
            request_id=self._request_id("state", attempt, sha256, metrics_json),
            attempt=wire_attempt(attempt),
            state_sha256=sha256,
            metrics_json=metrics_json,
        )
        await self._call(self._coordinator.SubmitState, request, patience_s)

    async def attest(self, attempt: AttemptId, sha256: str, reason: str, patience_s: float) -> None:
        request = coordinator_pb.AttestStateRequest(
            request_id=self._request_id("attest", attempt, sha256, reason),
            attempt=wire_attempt(attempt),
            state_sha256=sha256,
            agrees=not reason,
            reason=reason[:_REASON_LENGTH],
        )
        await self._call(self._coordinator.AttestState, request, patience_s)

    async def reported_ledger(self, patience_s: float) -> LedgerStanding:
        request = registry_pb.ListLedgersRequest()
        ledgers = (await self._call(self._registry.ListLedgers, request, patience_s)).ledgers
        own = next((ledger.head for ledger in ledgers if ledger.hospital_id == self._hospital_id), None)
        return parse_standing(own or registry_pb.LedgerHead())

    async def report_ledger(
        self, head: Head, signature: bytes, entries: Sequence[Entry], patience_s: float
    ) -> LedgerStanding:
        first = entries[0].seq if entries else 0
        request = registry_pb.ReportLedgerRequest(
            request_id=self._request_id("ledger", first, head.sha256, signature.hex()),
            head=registry_pb.LedgerHead(seq=head.seq, sha256=head.sha256, signature=signature),
            entries=[registry_pb.LedgerEntry(seq=item.seq, body=item.body, sha256=item.sha256) for item in entries],
        )
        response = await self._call(self._registry.ReportLedger, request, patience_s)
        return parse_standing(response.head, differs=response.differs)

    async def report_checks(self, statement: bytes, signature: bytes, patience_s: float) -> None:
        request = promotion_pb.ReportChecksRequest(
            request_id=self._request_id("checks", hashlib.sha256(statement).hexdigest()),
            report=promotion_pb.CheckReport(hospital_id=self._hospital_id, statement=statement, signature=signature),
        )
        await self._call(self._promotion.ReportChecks, request, patience_s)

    async def decline(self, job_id: str, code: str, reason: str, patience_s: float) -> None:
        request = coordinator_pb.DeclineJobRequest(
            request_id=self._request_id("decline", job_id, code, reason),
            job_id=job_id,
            code=code,
            reason=reason[:_REASON_LENGTH],
        )
        await self._call(self._coordinator.DeclineJob, request, patience_s)

    async def _call(self, method: Any, request: Any, patience_s: float) -> Any:
        return await call(method, request, timeout_s=self._limits.call_timeout_s, patience_s=patience_s)

    async def _transfer(self, method: Any, messages: Any, patience_s: float) -> None:
        await call(method, messages, timeout_s=self._limits.transfer_timeout_s, patience_s=patience_s)

    async def _download(
        self,
        method: Any,
        request: Any,
        limit: int,
        patience_s: float,
        restart: Callable[[], object],
        take: Callable[[Any], int],
    ) -> None:
        """Hand over a stream's messages one by one, from its beginning at every try, after `restart`.

        `take` says how many bytes of payload there were.

        Raises: FedmeshError(TOO_LARGE) beyond `limit` bytes; as the server raised it.
        """
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, FedmeshError) and error.retryable),
            stop=stop_after_delay(patience_s),
            wait=wait_exponential_jitter(initial=0.1, max=2.0),
            reraise=True,
        ):
            with attempt:
                restart()
                size = 0
                async for response in stream(method, request, timeout_s=self._limits.transfer_timeout_s):
                    size += take(response)
                    if size > limit:
                        raise FedmeshError(Code.TOO_LARGE, f"the download has more than {limit} bytes", limit=limit)

    def _request_id(self, *parts: object) -> str:
        return str(uuid.uuid5(_REQUESTS, "\n".join(str(part) for part in (self._hospital_id, *parts))))
