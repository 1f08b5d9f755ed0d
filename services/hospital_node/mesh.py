"""The gRPC side of the node: calls to registry, coordinator and aggregator, and conversion of their messages."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from datetime import UTC
from typing import Any, Final

from fedmesh.aggregator.v1 import aggregator_pb2 as aggregator_pb
from fedmesh.aggregator.v1 import aggregator_pb2_grpc as aggregator_rpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as coordinator_pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as coordinator_rpc
from fedmesh.registry.v1 import registry_pb2 as registry_pb
from fedmesh.registry.v1 import registry_pb2_grpc as registry_rpc
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_exponential_jitter

from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, chunks, stream
from services.hospital_node.config import LimitsConfig
from services.hospital_node.domain.ports import JobFacts
from services.hospital_node.domain.tasks import AttemptId, Contribution, Task, TaskKind
from services.plans.manifest import PlanManifest

# Request ids are derived from what is asked, so that a repetition, even after a restart, carries the same id.
_REQUESTS: Final = uuid.uuid5(uuid.NAMESPACE_URL, "https://fedmesh/hospital-node/requests")
_REASON_LENGTH: Final = 500
_KINDS: Final[dict[int, TaskKind]] = {
    coordinator_pb.TASK_KIND_TRAIN: TaskKind.TRAIN,
    coordinator_pb.TASK_KIND_UPLOAD: TaskKind.UPLOAD,
    coordinator_pb.TASK_KIND_DECRYPT: TaskKind.DECRYPT,
    coordinator_pb.TASK_KIND_FINALIZE: TaskKind.FINALIZE,
    coordinator_pb.TASK_KIND_ATTEST: TaskKind.ATTEST,
    coordinator_pb.TASK_KIND_COMMITTED: TaskKind.COMMITTED,
    coordinator_pb.TASK_KIND_ABORTED: TaskKind.ABORTED,
    coordinator_pb.TASK_KIND_JOB_ENDED: TaskKind.JOB_ENDED,
}


class GrpcMesh:
    """See `domain.ports.Mesh` for the contract."""

    def __init__(
        self,
        hospital_id: str,
        group_key_fingerprint: str,
        registry: MeshChannel,
        coordinator: MeshChannel,
        aggregator: MeshChannel,
        limits: LimitsConfig,
    ) -> None:
        self._hospital_id = hospital_id
        self._fingerprint = group_key_fingerprint
        self._registry = registry.stub(registry_rpc.RegistryServiceStub)
        self._coordinator = coordinator.stub(coordinator_rpc.CoordinatorServiceStub)
        self._aggregator = aggregator.stub(aggregator_rpc.AggregatorServiceStub)
        self._limits = limits

    async def watch(self, cursor: str) -> AsyncIterator[tuple[str, Task | None]]:
        request = coordinator_pb.WatchTasksRequest(cursor=cursor, group_key_fingerprint=self._fingerprint)
        async with aclosing(stream(self._coordinator.WatchTasks, request)) as responses:  # type: ignore[type-var]
            while True:
                try:
                    async with asyncio.timeout(self._limits.heartbeat_timeout_s):
                        response = await anext(responses)
                except StopAsyncIteration:
                    return
                except TimeoutError:
                    raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the task stream fell silent") from None
                yield response.cursor, _task(response.task) if response.HasField("task") else None

    async def get_plan(self, plan_id: str, patience_s: float) -> bytes:
        request = registry_pb.GetPlanRequest(plan_id=plan_id)
        response = await self._call(self._registry.GetPlan, request, patience_s)
        return bytes(response.plan.manifest)

    async def get_job(self, job_id: str, patience_s: float) -> JobFacts:
        request = registry_pb.GetJobRequest(job_id=job_id)
        job = (await self._call(self._registry.GetJob, request, patience_s)).job
        return JobFacts(job.plan_id, tuple(job.hospital_ids), job.rounds)

    async def download_blob(self, sha256: str, patience_s: float) -> bytes:
        request = registry_pb.DownloadBlobRequest(sha256=sha256)
        limit = self._limits.max_state_mb * 1024 * 1024
        return await self._download(self._registry.DownloadBlob, request, limit, patience_s)

    async def upload_blob(self, job_id: str, sha256: str, content: bytes, patience_s: float) -> None:
        header = registry_pb.BlobHeader(
            request_id=self._request_id("blob", job_id, sha256), job_id=job_id, sha256=sha256, size_bytes=len(content)
        )

        def messages() -> Iterable[registry_pb.UploadBlobRequest]:
            yield registry_pb.UploadBlobRequest(header=header)
            for chunk in chunks(content):
                yield registry_pb.UploadBlobRequest(chunk=chunk)

        await self._transfer(self._registry.UploadBlob, messages, patience_s)

    async def upload(
        self, attempt: AttemptId, manifest: PlanManifest, sha256: str, ciphertext: bytes, patience_s: float
    ) -> None:
        header = aggregator_pb.UploadHeader(
            request_id=self._request_id("upload", attempt, sha256),
            attempt=_attempt(attempt),
            form=round_pb2.SumForm(
                parameter_set=manifest.encoding.parameter_set,
                lanes=manifest.encoding.lanes,
                vector_length=manifest.vector_length,
            ),
            size_bytes=len(ciphertext),
            ciphertext_sha256=sha256,
        )

        def messages() -> Iterable[aggregator_pb.UploadRequest]:
            yield aggregator_pb.UploadRequest(header=header)
            for chunk in chunks(ciphertext):
                yield aggregator_pb.UploadRequest(chunk=chunk)

        await self._transfer(self._aggregator.Upload, messages, patience_s)

    async def download_sum(self, attempt: AttemptId, size_limit: int, patience_s: float) -> bytes:
        request = aggregator_pb.DownloadSumRequest(attempt=_attempt(attempt))
        return await self._download(self._aggregator.DownloadSum, request, size_limit, patience_s)

    async def report_ready(self, attempt: AttemptId, base_version: int, patience_s: float) -> None:
        request = coordinator_pb.ReportReadyRequest(
            request_id=self._request_id("ready", attempt), attempt=_attempt(attempt), base_version=base_version
        )
        await self._call(self._coordinator.ReportReady, request, patience_s)

    async def report_upload(self, attempt: AttemptId, sha256: str, size: int, patience_s: float) -> None:
        request = coordinator_pb.ReportUploadRequest(
            request_id=self._request_id("report-upload", attempt, sha256),
            attempt=_attempt(attempt),
            ciphertext_sha256=sha256,
            size_bytes=size,
        )
        await self._call(self._coordinator.ReportUpload, request, patience_s)

    async def submit_digest(self, attempt: AttemptId, sum_sha256: str, digest: bytes, patience_s: float) -> None:
        request = coordinator_pb.SubmitDigestRequest(
            request_id=self._request_id("digest", attempt, sum_sha256, digest.hex()),
            attempt=_attempt(attempt),
            sum_sha256=sum_sha256,
            digest=digest,
        )
        await self._call(self._coordinator.SubmitDigest, request, patience_s)

    async def submit_state(self, attempt: AttemptId, sha256: str, metrics_json: str, patience_s: float) -> None:
        request = coordinator_pb.SubmitStateRequest(
            request_id=self._request_id("state", attempt, sha256, metrics_json),
            attempt=_attempt(attempt),
            state_sha256=sha256,
            metrics_json=metrics_json,
        )
        await self._call(self._coordinator.SubmitState, request, patience_s)

    async def attest(self, attempt: AttemptId, sha256: str, reason: str, patience_s: float) -> None:
        request = coordinator_pb.AttestStateRequest(
            request_id=self._request_id("attest", attempt, sha256, reason),
            attempt=_attempt(attempt),
            state_sha256=sha256,
            agrees=not reason,
            reason=reason[:_REASON_LENGTH],
        )
        await self._call(self._coordinator.AttestState, request, patience_s)

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

    async def _download(self, method: Any, request: Any, limit: int, patience_s: float) -> bytes:
        """Collect a stream of chunks, from its beginning at every try.

        Raises: FedmeshError(TOO_LARGE) beyond `limit` bytes; as the server raised it.
        """
        async for attempt in AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, FedmeshError) and error.retryable),
            stop=stop_after_delay(patience_s),
            wait=wait_exponential_jitter(initial=0.1, max=2.0),
            reraise=True,
        ):
            with attempt:
                content = bytearray()
                async for response in stream(method, request, timeout_s=self._limits.transfer_timeout_s):
                    content += response.chunk
                    if len(content) > limit:
                        raise FedmeshError(Code.TOO_LARGE, f"the download has more than {limit} bytes", limit=limit)
                return bytes(content)
        raise AssertionError("tenacity reraises")

    def _request_id(self, *parts: object) -> str:
        return str(uuid.uuid5(_REQUESTS, "\n".join(str(part) for part in (self._hospital_id, *parts))))


def _attempt(attempt: AttemptId) -> round_pb2.Attempt:
    return round_pb2.Attempt(job_id=attempt.job_id, round=attempt.round, attempt=attempt.attempt)


def _task(message: coordinator_pb.Task) -> Task | None:
    """A task; None for a kind that this build does not know, which it leaves to newer ones."""
    kind = _KINDS.get(message.kind)
    if kind is None:
        return None
    return Task(
        kind=kind,
        attempt=AttemptId(message.attempt.job_id, message.attempt.round, message.attempt.attempt),
        plan_id=message.plan_id,
        base_version=message.base_version,
        base_state_sha256=message.base_state_sha256,
        deadline=message.deadline.ToDatetime(tzinfo=UTC) if message.HasField("deadline") else None,
        group=tuple(message.group),
        cohort=tuple(message.cohort),
        contributions=tuple(Contribution(item.hospital_id, item.ciphertext_sha256) for item in message.contributions),
        sum_sha256=message.sum_sha256,
        finalizer=message.finalizer,
        next_state_sha256=message.next_state_sha256,
        reason=message.reason,
    )
