"""A hospital as the services see it: real certificates, real ciphertexts, and a model that is only a hash."""

import asyncio
import hashlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as rpc

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, chunks, stream
from services.common.ids import new_id
from services.plans.manifest import PlanManifest
from services.secure_sum import secret

PATIENCE_S = 30.0


class Died(Exception):
    """Stops a hospital for good."""


class SimulatedHospital:
    """`before` is called with each task before it is done, and may raise `Died`."""

    def __init__(
        self,
        hospital_id: str,
        tls: TlsConfig,
        coordinators: list[str],
        aggregator: str,
        manifest: PlanManifest,
        group_key: bytes,
    ) -> None:
        self.hospital_id = hospital_id
        self.tls = tls
        self.coordinators = coordinators
        self.before: Callable[[pb.Task], Awaitable[None]] | None = None
        self.lies = False
        self.ended = asyncio.Event()
        self.end_reason = ""
        self.aborted: list[str] = []
        self.versions: list[int] = []
        self.plaintexts: dict[tuple[int, int], Any] = {}
        self.kinds: list[int] = []
        self._aggregator = MeshChannel(aggregator, tls)
        self._manifest = manifest
        self._group_key = group_key
        self._ciphertexts: dict[tuple[int, int], bytes] = {}
        self._task: asyncio.Task[None] | None = None
        self._channels = {target: MeshChannel(target, tls) for target in coordinators}

    def values(self, round_number: int, attempt: int) -> Any:
        """The hospital's contribution, int64[vector_length]."""
        seed = hashlib.sha256(f"{self.hospital_id}/{round_number}/{attempt}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        return generator.integers(-1000, 1000, self._manifest.vector_length, dtype=np.int64)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def finish(self) -> None:
        """Wait for the end of the job; raises what made the hospital fail."""
        assert self._task is not None
        ended = asyncio.create_task(self.ended.wait())
        await asyncio.wait([ended, self._task], return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if self._task.done():
            self._task.result()

    async def stop(self) -> None:
        """Disappear as a killed process does: streams and channels break."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._disconnect()

    async def _disconnect(self) -> None:
        for channel in (*self._channels.values(), self._aggregator):
            await channel.close()

    async def _run(self) -> None:
        cursor = ""
        turn = 0
        while not self.ended.is_set():
            target = self.coordinators[turn % len(self.coordinators)]
            stub = self._channels[target].stub(rpc.CoordinatorServiceStub)
            request = pb.WatchTasksRequest(cursor=cursor, group_key_fingerprint="0123456789abcdef")
            try:
                async for response in stream(stub.WatchTasks, request):
                    if response.HasField("task"):
                        await self._do(response.task)
                    cursor = response.cursor
            except FedmeshError as error:
                if not error.retryable and error.code is not Code.CANCELLED:
                    raise
                turn += 1
                await asyncio.sleep(0.1)
            except Died:
                await self._disconnect()
                return

    async def _do(self, task: pb.Task) -> None:
        self.kinds.append(task.kind)
        if self.before is not None:
            await self.before(task)
        steps = {
            pb.TASK_KIND_TRAIN: self._train,
            pb.TASK_KIND_UPLOAD: self._upload,
            pb.TASK_KIND_DECRYPT: self._decrypt,
            pb.TASK_KIND_FINALIZE: self._finalize,
            pb.TASK_KIND_ATTEST: self._attest,
        }
        if task.kind in steps:
            try:
                await steps[task.kind](task)
            except FedmeshError as error:
                # The round went on without this hospital, or was lost: the next task says how.
                if error.code not in (Code.WRONG_STATE, Code.NOT_FOUND):
                    raise
        elif task.kind == pb.TASK_KIND_COMMITTED:
            self.versions.append(task.base_version)
        elif task.kind == pb.TASK_KIND_ABORTED:
            self.aborted.append(task.reason)
        elif task.kind == pb.TASK_KIND_JOB_ENDED:
            self.end_reason = task.reason
            self.ended.set()

    async def report(self, name: str, request: Any) -> Any:
        """Send a report to whichever coordinator answers."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        turn = 0
        while True:
            target = self.coordinators[turn % len(self.coordinators)]
            stub = self._channels[target].stub(rpc.CoordinatorServiceStub)
            try:
                return await call(getattr(stub, name), request, timeout_s=3)
            except FedmeshError as error:
                if not error.retryable or loop.time() > deadline:
                    raise
                turn += 1
                await asyncio.sleep(0.1)

    async def _train(self, task: pb.Task) -> None:
        request = pb.ReportReadyRequest(request_id=new_id(), attempt=task.attempt, base_version=task.base_version)
        await self.report("ReportReady", request)

    async def _upload(self, task: pb.Task) -> None:
        content = await self.ciphertext(task.attempt)
        await self.upload(task.attempt, content)
        sha256 = hashlib.sha256(content).hexdigest()
        request = pb.ReportUploadRequest(
            request_id=new_id(), attempt=task.attempt, ciphertext_sha256=sha256, size_bytes=len(content)
        )
        await self.report("ReportUpload", request)

    async def ciphertext(self, attempt: round_pb2.Attempt) -> bytes:
        """This attempt's ciphertext, the same at every call."""
        key = (attempt.round, attempt.attempt)
        if key not in self._ciphertexts:
            values, lanes = self.values(*key), self._manifest.encoding.lanes
            self._ciphertexts[key] = await asyncio.to_thread(secret.encrypt, values, self._group_key, lanes)
        return self._ciphertexts[key]

    def form(self) -> round_pb2.SumForm:
        return round_pb2.SumForm(
            parameter_set=self._manifest.encoding.parameter_set,
            lanes=self._manifest.encoding.lanes,
            vector_length=self._manifest.vector_length,
        )

    async def upload(self, attempt: round_pb2.Attempt, content: bytes) -> aggregator_pb2.UploadResponse:
        stub = self._aggregator.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        header = aggregator_pb2.UploadHeader(
            request_id=new_id(),
            attempt=attempt,
            form=self.form(),
            size_bytes=len(content),
            ciphertext_sha256=hashlib.sha256(content).hexdigest(),
        )

        def messages() -> Any:
            yield aggregator_pb2.UploadRequest(header=header)
            for chunk in chunks(content):
                yield aggregator_pb2.UploadRequest(chunk=chunk)

        answer: aggregator_pb2.UploadResponse = await call(stub.Upload, messages, timeout_s=5, patience_s=PATIENCE_S)
        return answer

    async def download(self, attempt: round_pb2.Attempt) -> bytes:
        stub = self._aggregator.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        request = aggregator_pb2.DownloadSumRequest(attempt=attempt)
        while True:
            try:
                return b"".join([part.chunk async for part in stream(stub.DownloadSum, request, timeout_s=5)])
            except FedmeshError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.1)

    async def _decrypt(self, task: pb.Task) -> None:
        total = await self.download(task.attempt)
        assert hashlib.sha256(total).hexdigest() == task.sum_sha256
        length, lanes = self._manifest.vector_length, self._manifest.encoding.lanes
        plaintext = await asyncio.to_thread(secret.decrypt, total, self._group_key, length, lanes)
        self.plaintexts[task.attempt.round, task.attempt.attempt] = plaintext
        context = secret.round_context(task.attempt.job_id, task.attempt.round, task.attempt.attempt)
        digest = secret.keyed_digest(self._group_key, context, bytes.fromhex(task.sum_sha256), plaintext)
        request = pb.SubmitDigestRequest(
            request_id=new_id(), attempt=task.attempt, sum_sha256=task.sum_sha256, digest=digest
        )
        await self.report("SubmitDigest", request)

    def _next_state(self, task: pb.Task) -> str:
        plaintext = self.plaintexts[task.attempt.round, task.attempt.attempt]
        return hashlib.sha256(task.base_state_sha256.encode() + plaintext.tobytes()).hexdigest()

    async def _finalize(self, task: pb.Task) -> None:
        sha256 = self._next_state(task)[::-1] if self.lies else self._next_state(task)
        request = pb.SubmitStateRequest(
            request_id=new_id(),
            attempt=task.attempt,
            state_sha256=sha256,
            metrics_json=json.dumps({"validation_loss": 0.5}),
        )
        await self.report("SubmitState", request)

    async def _attest(self, task: pb.Task) -> None:
        agrees = self._next_state(task) == task.next_state_sha256
        request = pb.AttestStateRequest(
            request_id=new_id(),
            attempt=task.attempt,
            state_sha256=task.next_state_sha256,
            agrees=agrees,
            reason="" if agrees else "another state follows from the sum",
        )
        await self.report("AttestState", request)
