"""A hospital as the services see it: real certificates, statements and ciphertexts, and a model that is only a hash."""

import asyncio
import hashlib
import json
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2 as pb
from fedmesh.coordinator.v1 import coordinator_pb2_grpc as rpc

from services.common.config import TlsConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.ids import new_id
from services.plans.manifest import PlanManifest
from services.secure_sum import masks, opening, public, secret
from services.secure_sum.member import Member, MemberState
from services.secure_sum.roster import MemberKeys, Roster
from services.secure_sum.statements import Advert, AttemptRef, Share, Signed, Upload, parse, sign
from services.secure_sum.wire import layout_of
from tests.support.secure_sum import sum_segments

PATIENCE_S = 30.0

# The round went on without this hospital, or was lost: the next task says how.
_PASSED = (Code.WRONG_STATE, Code.NOT_FOUND, Code.ALREADY_CONTRIBUTED)
_ANSWERED_BY_ALL = (
    pb.TASK_KIND_TRAIN,
    pb.TASK_KIND_SHARE,
    pb.TASK_KIND_UPLOAD,
    pb.TASK_KIND_CONFIRM,
    pb.TASK_KIND_UNMASK,
    pb.TASK_KIND_DECRYPT,
)


class Died(Exception):
    """Stops a hospital for good."""


class Skipped(Exception):
    """Leaves a task undone."""


class Away(Exception):
    """Leaves the task undone and the mesh alone until a condition holds."""

    def __init__(self, until: Callable[[], bool]) -> None:
        super().__init__()
        self.until = until


@dataclass
class Habits:
    """How a hospital misbehaves.

    lies: task kinds that it answers with something that nobody honest sends. deals_badly: its shares are signed and in
    form, but do not open. deals_crookedly: they open, but to another seed than the one that it masks with.
    signs_twice: it tells the coordinator of its ciphertext under another statement than the aggregator.
    other_state: it computes another next state, which is as good. ages: of what it contributes, by round. drops: so
    many of a hundred calls are lost, half of them after the server has acted.
    """

    lies: set[int] = field(default_factory=set)
    deals_badly: bool = False
    deals_crookedly: bool = False
    signs_twice: bool = False
    other_state: bool = False
    ages: dict[int, int] = field(default_factory=dict)
    drops: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(11))


@dataclass(frozen=True)
class Consortium:
    """What all hospitals of a test share."""

    coordinators: list[str]
    aggregator: str
    manifest: PlanManifest
    group_key: bytes
    roster: Roster


class SimulatedHospital:
    """`before` is called with each task before it is done, and may raise `Died`, `Skipped` or `Away`.

    after_refusal: what to do when a lie was refused. awaited: others without which it does nothing in a round: they
    answer first, unless they left, so that who counts does not depend on how busy the machine is.
    """

    def __init__(self, keys: MemberKeys, tls: TlsConfig, shared: Consortium) -> None:
        self.hospital_id = keys.hospital_id
        self.tls = tls
        self.keys = keys
        self.before: Callable[[pb.Task], Awaitable[None]] | None = None
        self.after_refusal: Callable[[pb.Task], None] | None = None
        self.awaited: list[SimulatedHospital] = []
        self.answered: set[tuple[int, int, int]] = set()
        self.left: set[tuple[int, int]] = set()
        self.habits = Habits()
        self.ended = asyncio.Event()
        self.end_reason = ""
        self.aborted: list[str] = []
        self.burnt: list[str] = []
        self.refused: list[FedmeshError] = []
        self.versions: list[int] = []
        self.plaintexts: dict[tuple[int, int], Any] = {}
        self.kinds: list[int] = []
        self.states: dict[tuple[int, int], MemberState] = {}
        self.coordinators = shared.coordinators
        self._shared = shared
        self._member = Member(keys, shared.roster)
        self._layout = layout_of(
            shared.manifest.encoding.parameter_set, shared.manifest.vector_length, shared.manifest.encoding.lanes
        )
        self._segments: dict[tuple[int, int], list[bytes]] = {}
        self._task: asyncio.Task[None] | None = None
        self._connect()

    def _connect(self) -> None:
        self._aggregator = MeshChannel(self._shared.aggregator, self.tls)
        self._channels = {target: MeshChannel(target, self.tls) for target in self.coordinators}

    def values(self, round_number: int, attempt: int) -> Any:
        """The hospital's contribution, int64[vector_length]."""
        seed = hashlib.sha256(f"{self.hospital_id}/{round_number}/{attempt}".encode()).digest()
        generator = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        return generator.integers(-1000, 1000, self._layout.vector_length, dtype=np.int64)

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
                    cursor = response.cursor
                    if response.HasField("task"):
                        await self._do(response.task)
            except FedmeshError as error:
                if not error.retryable and error.code is not Code.CANCELLED:
                    raise
                turn += 1
                await asyncio.sleep(0.1)
            except Away as away:
                await self._disconnect()
                while not away.until():  # noqa: ASYNC110 - another process
                    await asyncio.sleep(0.02)
                self._connect()
            except Died:
                await self._disconnect()
                return

    async def _do(self, task: pb.Task) -> None:
        if task.kind in _ANSWERED_BY_ALL:
            await self._let_others_answer(task)
        try:
            await self._answer(task)
        except Away:
            self.left.add(_key(task))
            raise
        self.answered.add((*_key(task), task.kind))

    async def _let_others_answer(self, task: pb.Task) -> None:
        key = _key(task)
        async with asyncio.timeout(PATIENCE_S):
            for other in self.awaited:
                while key not in other.left and (*key, task.kind) not in other.answered:  # noqa: ASYNC110 - its task
                    await asyncio.sleep(0.02)

    async def _answer(self, task: pb.Task) -> None:
        self.kinds.append(task.kind)
        if self.before is not None:
            try:
                await self.before(task)
            except Skipped:
                return
        steps = {
            pb.TASK_KIND_TRAIN: self._train,
            pb.TASK_KIND_SHARE: self._share,
            pb.TASK_KIND_UPLOAD: self._upload,
            pb.TASK_KIND_CONFIRM: self._confirm,
            pb.TASK_KIND_UNMASK: self._unmask,
            pb.TASK_KIND_DECRYPT: self._decrypt,
            pb.TASK_KIND_FINALIZE: self._finalize,
            pb.TASK_KIND_ATTEST: self._attest,
        }
        if task.kind == pb.TASK_KIND_TRAIN or (task.kind in steps and _key(task) in self.states):
            try:
                await steps[task.kind](task)
            except FedmeshError as error:
                untrue = task.kind in self.habits.lies or task.attempt.round in self.habits.ages
                if untrue and error.code is Code.STATEMENT_INVALID:
                    self.refused.append(error)
                    if self.after_refusal is not None:
                        self.after_refusal(task)
                elif error.code not in _PASSED:
                    raise
        elif task.kind == pb.TASK_KIND_COMMITTED:
            self.versions.append(task.base_version)
        elif task.kind == pb.TASK_KIND_BURNT:
            self.burnt.append(task.reason)
        elif task.kind == pb.TASK_KIND_ABORTED:
            self.aborted.append(task.reason)
        elif task.kind == pb.TASK_KIND_JOB_ENDED:
            self.end_reason = task.reason
            self.ended.set()

    # ---- calls

    async def report(self, name: str, request: Any) -> Any:
        """Send a report to whichever coordinator answers."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PATIENCE_S
        turn = 0
        while True:
            target = self.coordinators[turn % len(self.coordinators)]
            stub = self._channels[target].stub(rpc.CoordinatorServiceStub)
            try:
                return await self._lossy(call(getattr(stub, name), request, timeout_s=3))
            except FedmeshError as error:
                if not error.retryable or loop.time() > deadline:
                    raise
                turn += 1
                await asyncio.sleep(0.1)

    async def _lossy(self, calling: Any) -> Any:
        roll = self.habits.chance.randrange(100)
        if roll < self.habits.drops // 2:
            calling.close()
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the call was lost")
        answer = await calling
        if roll < self.habits.drops:
            raise FedmeshError(Code.SERVICE_UNAVAILABLE, "the answer was lost")
        return answer

    async def upload(self, task: pb.Task, segments: list[bytes], signed: Signed) -> aggregator_pb2.UploadResponse:
        stub = self._aggregator.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        form = round_pb2.SumForm(
            parameter_set=self._layout.params.name,
            lanes=self._layout.lanes,
            vector_length=self._layout.vector_length,
        )
        header = aggregator_pb2.UploadHeader(
            request_id=new_id(),
            attempt=task.attempt,
            form=form,
            size_bytes=sum(map(len, segments)),
            ciphertext_sha256=hashlib.sha256(b"".join(segments)).hexdigest(),
            upload=_wire(signed),
        )

        def messages() -> Any:
            yield aggregator_pb2.UploadRequest(header=header)
            for segment in segments:
                yield aggregator_pb2.UploadRequest(chunk=segment)

        answer: aggregator_pb2.UploadResponse = await call(stub.Upload, messages, timeout_s=5, patience_s=PATIENCE_S)
        return answer

    async def download(self, attempt: round_pb2.Attempt) -> list[bytes]:
        stub = self._aggregator.stub(aggregator_pb2_grpc.AggregatorServiceStub)
        request = aggregator_pb2.DownloadSumRequest(attempt=attempt)
        while True:
            try:
                content = b"".join([part.chunk async for part in stream(stub.DownloadSum, request, timeout_s=5)])
                return sum_segments(self._layout, content)
            except FedmeshError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(0.1)

    # ---- one method for each task

    def _lying(self, task: pb.Task) -> bool:
        return task.kind in self.habits.lies

    async def _train(self, task: pb.Task) -> None:
        assert task.roster_sha256 == self._shared.roster.sha256
        if _key(task) not in self.states:
            age = self.habits.ages.get(task.attempt.round, 0)
            self.states[_key(task)] = self._member.begin(_ref(task), task.epoch, list(task.cohort), age)
        advert = self.states[_key(task)].advert
        request = pb.ReportReadyRequest(
            request_id=new_id(),
            attempt=task.attempt,
            base_version=task.base_version - parse(Advert, advert.statement).age,
            advert=_wire(_forged(advert) if self._lying(task) else advert),
        )
        await self.report("ReportReady", request)

    async def _share(self, task: pb.Task) -> None:
        adverts = [_signed(item) for item in task.adverts]
        state = self.states[_key(task)]
        seed = bytes(16) if self.habits.deals_crookedly else state.self_seed
        shared = self._member.share(replace(state, self_seed=seed), adverts, self._shared.manifest.rounds.oldest)
        state = self._keep(task, replace(shared, self_seed=state.self_seed))
        shares = list(state.shares_out)
        if self._lying(task):
            shares[0] = _forged(shares[0])
        if self.habits.deals_badly:
            shares = [self._bad_share(item) for item in shares]
        request = pb.SubmitSharesRequest(request_id=new_id(), attempt=task.attempt, shares=map(_wire, shares))
        await self.report("SubmitShares", request)

    def _bad_share(self, signed: Signed) -> Signed:
        share = parse(Share, signed.statement)
        return sign(share.model_copy(update={"box": share.box[::-1]}), self.keys)

    async def _upload(self, task: pb.Task) -> None:
        shares = [_signed(item) for item in task.shares]
        state = self._keep(task, self._member.receive(self.states[_key(task)], list(task.sharers), shares))
        if _key(task) not in self._segments:
            self._segments[_key(task)] = await asyncio.to_thread(self._encrypt, state, _key(task))
        segments = self._segments[_key(task)]
        hashes = [hashlib.sha256(segment).hexdigest() for segment in segments]
        content_sha256 = hashlib.sha256(b"".join(segments)).hexdigest()
        layout = self._layout
        state = self._keep(
            task,
            self._member.commit(state, layout.params.name, layout.lanes, layout.vector_length, content_sha256, hashes),
        )
        assert state.upload is not None
        await self.upload(task, segments, state.upload)
        told = self._with_other_segments(state.upload) if self.habits.signs_twice else state.upload
        request = pb.ReportUploadRequest(
            request_id=new_id(),
            attempt=task.attempt,
            ciphertext_sha256=content_sha256,
            size_bytes=layout.upload_bytes,
            upload=_wire(_forged(told) if self._lying(task) else told),
        )
        await self.report("ReportUpload", request)

    def _with_other_segments(self, signed: Signed) -> Signed:
        """As true to the ciphertext as the statement before, but of segments that nobody will find in it."""
        said = parse(Upload, signed.statement)
        other = said.model_copy(update={"segments": tuple(sha256[::-1] for sha256 in said.segments)})
        return sign(other, self.keys)

    def _encrypt(self, state: MemberState, key: tuple[int, int]) -> list[bytes]:
        layout, plan = self._layout, self._member.mask_plan(state)
        values = self.values(*key)
        return [
            public.add_masked(layout, index, zeros, values[slice(at, at + count)], masks.coefficients(plan, *where))
            for index, zeros in enumerate(secret.encrypt_zeros(self._shared.group_key, layout))
            for where, (at, count) in [(layout.coefficients(index), layout.values(index))]
        ]

    async def _confirm(self, task: pb.Task) -> None:
        state = self._keep(task, self._member.confirm(self.states[_key(task)], task.survivors))
        request = pb.ConfirmSurvivorsRequest(
            request_id=new_id(),
            attempt=task.attempt,
            survivors_sha256=hashlib.sha256(task.survivors).hexdigest(),
            signature=state.confirmation[::-1] if self._lying(task) else state.confirmation,
        )
        await self.report("ConfirmSurvivors", request)

    async def _unmask(self, task: pb.Task) -> None:
        # The promise that was given is kept even when the list came to this hospital only now.
        state = self._keep(task, self._member.confirm(self.states[_key(task)], task.survivors))
        confirmations = {item.hospital_id: item.signature for item in task.confirmations}
        state = self._keep(task, self._member.reveal(state, confirmations))
        assert state.reveal is not None
        reveal = _forged(state.reveal) if self._lying(task) else state.reveal
        request = pb.SubmitRevealRequest(request_id=new_id(), attempt=task.attempt, reveal=_wire(reveal))
        await self.report("SubmitReveal", request)

    async def _decrypt(self, task: pb.Task) -> None:
        self._check_opening(task)
        total = await self.download(task.attempt)
        assert hashlib.sha256(b"".join(total)).hexdigest() == task.sum_sha256
        plaintext = await asyncio.to_thread(secret.decrypt_segments, total, self._shared.group_key, self._layout)
        self.plaintexts[_key(task)] = plaintext
        context = secret.round_context(task.attempt.job_id, task.attempt.round, task.attempt.attempt)
        seen = plaintext + 1 if self._lying(task) else plaintext
        digest = secret.keyed_digest(self._shared.group_key, context, bytes.fromhex(task.sum_sha256), seen)
        next_state = self._next_state(task)
        state = self._keep(task, self._member.agree(self.states[_key(task)], task.sum_sha256, digest, next_state))
        assert state.digest is not None
        request = pb.SubmitDigestRequest(
            request_id=new_id(),
            attempt=task.attempt,
            sum_sha256=task.sum_sha256,
            digest=digest,
            signed=_wire(state.digest),
            next_state_sha256=next_state,
            metrics_json=_METRICS,
        )
        await self.report("SubmitDigest", request)

    def _check_opening(self, task: pb.Task) -> None:
        """What a hospital needs to check the sum is there and fits."""
        adverts, roster = self.states[_key(task)].adverts, self._shared.roster
        keys = opening.mask_keys(adverts, roster, list(task.sharers))
        opened = opening.Opening(
            {item.hospital_id: item.seed for item in task.opening.self_seeds},
            {item.hospital_id: item.seed for item in task.opening.mask_seeds},
        )
        survivors = [item.hospital_id for item in task.contributions]
        opening.correction(_ref(task), keys, survivors, opened)
        assert [item.hospital_id for item in task.uploads] == survivors

    def _next_state(self, task: pb.Task) -> str:
        plaintext = self.plaintexts[_key(task)]
        state = hashlib.sha256(task.base_state_sha256.encode() + plaintext.tobytes()).hexdigest()
        return state[::-1] if self.habits.other_state else state

    async def _finalize(self, task: pb.Task) -> None:
        state = self._next_state(task)
        request = pb.SubmitStateRequest(
            request_id=new_id(),
            attempt=task.attempt,
            state_sha256=state[::-1] if self._lying(task) else state,
            metrics_json=_METRICS,
        )
        await self.report("SubmitState", request)

    async def _attest(self, task: pb.Task) -> None:
        # A state that is only the spelling backwards stands for one that differs in the last bits.
        close = task.next_state_sha256 in (self._next_state(task), self._next_state(task)[::-1])
        agrees = close and not self._lying(task)
        request = pb.AttestStateRequest(
            request_id=new_id(),
            attempt=task.attempt,
            state_sha256=task.next_state_sha256,
            agrees=agrees,
            reason="" if agrees else "another state follows from the sum",
        )
        await self.report("AttestState", request)

    def _keep(self, task: pb.Task, state: MemberState) -> MemberState:
        """A real node has it on disk before it sends anything."""
        self.states[_key(task)] = MemberState.from_json(state.to_json())
        return state


_METRICS = json.dumps({"validation_loss": 0.5})


def _key(task: pb.Task) -> tuple[int, int]:
    return (task.attempt.round, task.attempt.attempt)


def _ref(task: pb.Task) -> AttemptRef:
    return AttemptRef(job_id=task.attempt.job_id, round=task.attempt.round, attempt=task.attempt.attempt)


def _wire(signed: Signed) -> round_pb2.Signed:
    return round_pb2.Signed(hospital_id=signed.hospital_id, statement=signed.statement, signature=signed.signature)


def _signed(message: round_pb2.Signed) -> Signed:
    return Signed(message.hospital_id, message.statement, message.signature)


def _forged(signed: Signed) -> Signed:
    """The statement under a signature that is not the hospital's."""
    return signed._replace(signature=signed.signature[::-1])
