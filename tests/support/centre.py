"""A centre that a test leads by hand.

It speaks the real protos over real mutual TLS, keeps what hospitals sign, and adds real masked BFV ciphertexts; only
its decisions come from the test.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedmesh.aggregator.v1 import aggregator_pb2, aggregator_pb2_grpc
from fedmesh.common.v1 import round_pb2
from fedmesh.coordinator.v1 import coordinator_pb2, coordinator_pb2_grpc
from fedmesh.registry.v1 import promotion_pb2, promotion_pb2_grpc, registry_pb2, registry_pb2_grpc

from services.common.config import ServerConfig
from services.common.errors import Code, FedmeshError
from services.common.grpc.gate import caller
from services.common.grpc.server import Endpoint, MeshServer
from services.embedded.ca import CertificateAuthority
from services.embedded.processes import free_port
from services.hospital_node.wire import parse_signed, wire_signed
from services.privacy.chain import Entry, Head
from services.registry.domain.entities import LedgerReport
from services.registry.domain.ledger import continuation
from services.secure_sum import public
from services.secure_sum.derive import MaskPlan
from services.secure_sum.masks import of_segment
from services.secure_sum.opening import check_epoch
from services.secure_sum.roster import Roster
from services.secure_sum.statements import EpochStatement, Signed, parse
from services.secure_sum.wire import Layout, layout_of

TIMEOUT_S = 90.0
Key = tuple[str, int, int]


@dataclass
class Faults:
    """What goes wrong: by method, errors raised before the centre acts, and after it acted."""

    before: dict[str, list[Exception]] = field(default_factory=dict)
    after: dict[str, list[Exception]] = field(default_factory=dict)
    held: dict[str, asyncio.Event] = field(default_factory=dict)

    async def enter(self, method: str) -> None:
        if self.before.get(method):
            raise self.before[method].pop(0)
        if method in self.held:
            await self.held[method].wait()

    def leave(self, method: str) -> None:
        if self.after.get(method):
            raise self.after[method].pop(0)


class Centre:
    """Registry, coordinator and aggregator on one port."""

    def __init__(self, ca: CertificateAuthority) -> None:
        self.config = ServerConfig(
            listen=f"127.0.0.1:{free_port()}", tls=ca.issue_service("centre"), drain_s=0, metrics_listen=None
        )
        self.server: MeshServer | None = None
        self.faults = Faults()
        self.plans: dict[str, bytes] = {}
        self.jobs: dict[str, registry_pb2.Job] = {}
        self.blobs: dict[str, bytes] = {}
        self.rosters: list[registry_pb2.Roster] = []
        self.epochs: dict[tuple[str, int], Signed] = {}
        self.published: list[Signed] = []
        self.present: Any = None
        self.due = 1
        self.due_for_s = 1000.0
        self.public_key = False
        self.uploads: dict[tuple[Key, str], list[list[bytes]]] = {}
        self.layouts: dict[Key, Layout] = {}
        self.sums: dict[Key, list[bytes]] = {}
        self.spoil_segment: Callable[[bytes], bytes] = bytes
        self.ledgers: dict[str, list[Entry]] = {}
        self.ledger_signatures: dict[str, bytes] = {}
        self.reports: list[tuple[str, str, Any]] = []
        self.checked: dict[str, bytes] = {}
        self.refuse: dict[str, FedmeshError] = {}
        self.watching: dict[str, asyncio.Queue[Any]] = {}
        self.cursors: list[tuple[str, str]] = []
        self.fingerprints: dict[str, str] = {}
        self._sent = 0
        self.changed = asyncio.Condition()

    async def start(self) -> None:
        self.server = MeshServer(
            self.config,
            [
                Endpoint(
                    registry_pb2.DESCRIPTOR.services_by_name["RegistryService"],
                    registry_pb2_grpc.add_RegistryServiceServicer_to_server,
                    _Registry(self),
                ),
                Endpoint(
                    promotion_pb2.DESCRIPTOR.services_by_name["PromotionService"],
                    promotion_pb2_grpc.add_PromotionServiceServicer_to_server,
                    _Promotion(self),
                ),
                Endpoint(
                    coordinator_pb2.DESCRIPTOR.services_by_name["CoordinatorService"],
                    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server,
                    _Coordinator(self),
                ),
                Endpoint(
                    aggregator_pb2.DESCRIPTOR.services_by_name["AggregatorService"],
                    aggregator_pb2_grpc.add_AggregatorServiceServicer_to_server,
                    _Aggregator(self),
                ),
            ],
        )
        await self.server.start()

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.stop()
            self.server = None

    async def notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def until(self, condition: Any, what: str) -> None:
        """Wait until a condition on this centre holds."""
        async with self.changed:
            try:
                await asyncio.wait_for(self.changed.wait_for(condition), TIMEOUT_S)
            except TimeoutError:
                kinds = [(hospital, kind) for hospital, kind, _ in self.reports]
                raise AssertionError(f"never came: {what}; reports so far: {kinds}") from None

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The last report of a kind by hospital."""
        return {hospital: request for hospital, name, request in self.reports if name == kind}

    def count(self, kind: str) -> int:
        return sum(name == kind for _, name, _ in self.reports)

    async def reported(self, kind: str, hospitals: Sequence[str], times: int = 1) -> dict[str, Any]:
        """Wait until each of `hospitals` has sent a report of a kind `times` times."""

        def enough() -> bool:
            sent = [hospital for hospital, name, _ in self.reports if name == kind]
            return all(sent.count(hospital) >= times for hospital in hospitals)

        await self.until(enough, f"{kind} from {list(hospitals)}")
        return self.of_kind(kind)

    async def connected(self, hospitals: Sequence[str]) -> None:
        await self.until(lambda: set(hospitals) <= set(self.watching), f"streams of {list(hospitals)}")

    def send(self, hospital: str, task: coordinator_pb2.Task) -> None:
        self._sent += 1
        response = coordinator_pb2.WatchTasksResponse(cursor=f"{self._sent}-0", task=task)
        self.watching[hospital].put_nowait(response)

    def publish_roster(self, roster: Roster, statement: bytes, signatures: Mapping[str, bytes]) -> None:
        """Make a roster the present one; an epoch is due then."""
        self.rosters.append(
            registry_pb2.Roster(
                statement=statement,
                signatures=[round_pb2.Signature(hospital_id=n, signature=v) for n, v in signatures.items()],
                sha256=roster.sha256,
            )
        )
        self.present, self.due = roster, 1

    def sum_up(self, key: Key, survivors: Sequence[str], correction: MaskPlan) -> str:
        """Add the newest uploads and take their masks off; SHA-256 of the encrypted sum."""
        layout = self.layouts[key]
        uploads = [self.uploads[key, name][-1] for name in survivors]
        self.sums[key] = [
            public.sum_segment(
                layout, index, [upload[index] for upload in uploads], of_segment(correction, layout, index)
            )
            for index in range(layout.segments)
        ]
        return hashlib.sha256(b"".join(self.sums[key])).hexdigest()


class _Registry(registry_pb2_grpc.RegistryServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def GetPlan(self, request: Any, _context: Any) -> Any:
        await self._centre.faults.enter("GetPlan")
        if request.plan_id not in self._centre.plans:
            raise FedmeshError(Code.NOT_FOUND, "no such plan")
        plan = registry_pb2.Plan(plan_id=request.plan_id, manifest=self._centre.plans[request.plan_id])
        return registry_pb2.GetPlanResponse(plan=plan)

    async def GetJob(self, request: Any, _context: Any) -> Any:
        return registry_pb2.GetJobResponse(job=self._centre.jobs[request.job_id])

    async def ListRosters(self, request: Any, _context: Any) -> Any:
        await self._centre.faults.enter("ListRosters")
        return registry_pb2.ListRostersResponse(rosters=self._centre.rosters[request.after_version :])

    async def GetEpoch(self, request: Any, _context: Any) -> Any:
        centre = self._centre
        await centre.faults.enter("GetEpoch")
        present = centre.rosters[-1].sha256 if centre.rosters else ""
        roster = request.roster_sha256 or present
        numbers = [number for sha256, number in centre.epochs if sha256 == roster]
        found = centre.epochs.get((roster, request.epoch or max(numbers, default=0)))
        return registry_pb2.GetEpochResponse(
            epoch=None if found is None else wire_signed(found),
            due=centre.due,
            due_for_s=centre.due_for_s,
            roster_sha256=present,
            public_key=centre.public_key,
        )

    async def PublishEpoch(self, request: Any, _context: Any) -> Any:
        centre = self._centre
        await centre.faults.enter("PublishEpoch")
        signed = parse_signed(request.epoch)
        check_epoch(signed, centre.present)
        centre.published.append(signed)
        said = parse(EpochStatement, signed.statement)
        stands = centre.epochs.setdefault((said.roster, said.epoch), signed)
        centre.due = 0
        await centre.notify()
        centre.faults.leave("PublishEpoch")
        return registry_pb2.PublishEpochResponse(epoch=wire_signed(stands))

    async def UploadBlob(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        await self._centre.faults.enter("UploadBlob")
        header = (await anext(aiter(requests))).header
        content = b"".join([request.chunk async for request in requests])
        assert hashlib.sha256(content).hexdigest() == header.sha256
        self._centre.blobs[header.sha256] = content
        return registry_pb2.UploadBlobResponse(sha256=header.sha256)

    async def ListLedgers(self, request: Any, _context: Any) -> Any:
        await self._centre.faults.enter("ListLedgers")
        ledger = registry_pb2.HospitalLedger(hospital_id=caller().name, head=self._ledger_head(caller().name))
        entries = [
            registry_pb2.LedgerEntry(seq=item.seq, body=item.body, sha256=item.sha256)
            for item in self._centre.ledgers.get(request.hospital_id, [])[request.after_seq :]
        ]
        return registry_pb2.ListLedgersResponse(ledgers=[ledger], entries=entries)

    async def ReportLedger(self, request: Any, _context: Any) -> Any:
        centre, name = self._centre, caller().name
        await centre.faults.enter("ReportLedger")
        kept = centre.ledgers.setdefault(name, [])
        entries = tuple(Entry(item.seq, item.body, item.sha256) for item in request.entries)
        head = Head(request.head.seq, request.head.sha256)
        newest = kept[-1].head if kept else Head()
        known = {entry.seq: entry.sha256 for entry in kept}
        fresh = continuation(LedgerReport(name, head, request.head.signature, entries), newest, known)
        if fresh:
            kept.extend(fresh)
            centre.ledger_signatures[name] = request.head.signature
        centre.reports.append((name, "ledger", request))
        await centre.notify()
        return registry_pb2.ReportLedgerResponse(head=self._ledger_head(name), differs=fresh is None)

    def _ledger_head(self, name: str) -> registry_pb2.LedgerHead:
        kept = self._centre.ledgers.get(name, [])
        newest = kept[-1].head if kept else Head()
        signature = self._centre.ledger_signatures.get(name, b"")
        return registry_pb2.LedgerHead(seq=newest.seq, sha256=newest.sha256, signature=signature)

    async def DownloadBlob(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        await self._centre.faults.enter("DownloadBlob")
        self._centre.reports.append((caller().name, "download_blob", request))
        if request.sha256 not in self._centre.blobs:
            raise FedmeshError(Code.NOT_FOUND, "no such blob")
        content = self._centre.blobs[request.sha256]
        for start in range(0, len(content), 1000):
            yield registry_pb2.DownloadBlobResponse(chunk=content[start : start + 1000])


class _Promotion(promotion_pb2_grpc.PromotionServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def ReportChecks(self, request: Any, _context: Any) -> Any:
        self._centre.checked[request.report.hospital_id] = request.report.statement
        return promotion_pb2.ReportChecksResponse()


class _Aggregator(aggregator_pb2_grpc.AggregatorServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def Upload(self, requests: AsyncIterator[Any], _context: Any) -> Any:
        centre = self._centre
        header = (await anext(aiter(requests))).header
        segments, begun = [], b""
        async for request in requests:
            begun += request.beginning or request.chunk
            if request.WhichOneof("part") == "chunk":
                segments.append(begun)
                begun = b""
        hospital = caller().name
        centre.reports.append((hospital, "bytes", b"".join(segments)))
        await centre.notify()
        await centre.faults.enter("Upload")
        key = _key(header)
        form = header.form
        layout = layout_of(form.parameter_set, form.vector_length, form.lanes)
        assert len(segments) == layout.segments
        for index, segment in enumerate(segments):
            public.check_segment(layout, index, segment)
        centre.layouts[key] = layout
        centre.uploads.setdefault((key, hospital), []).append(segments)
        centre.faults.leave("Upload")
        return aggregator_pb2.UploadResponse(
            contribution=round_pb2.Contribution(hospital_id=hospital, ciphertext_sha256=header.ciphertext_sha256)
        )

    async def GetSegments(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        await self._centre.faults.enter("GetSegments")
        self._centre.reports.append((caller().name, "get_segments", request))
        for (key, name), sent in sorted(self._centre.uploads.items()):
            if key == _key(request) and name != caller().name:
                segment = self._centre.spoil_segment(sent[-1][request.index])
                found = aggregator_pb2.UploadSegment(hospital_id=name, segment=segment)
                yield aggregator_pb2.GetSegmentsResponse(segments=[found])

    async def DownloadSum(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        await self._centre.faults.enter("DownloadSum")
        self._centre.reports.append((caller().name, "download_sum", request))
        for segment in self._centre.sums[_key(request)]:
            yield aggregator_pb2.DownloadSumResponse(chunk=segment)


class _Coordinator(coordinator_pb2_grpc.CoordinatorServiceServicer):
    def __init__(self, centre: Centre) -> None:
        self._centre = centre

    async def WatchTasks(self, request: Any, _context: Any) -> AsyncIterator[Any]:
        centre, hospital = self._centre, caller().name
        queue: asyncio.Queue[Any] = asyncio.Queue()
        centre.watching[hospital] = queue
        centre.cursors.append((hospital, request.cursor))
        centre.fingerprints[hospital] = request.group_key_fingerprint
        await centre.notify()
        try:
            yield coordinator_pb2.WatchTasksResponse(cursor=request.cursor)
            while True:
                try:
                    response = await asyncio.wait_for(queue.get(), 0.2)
                except TimeoutError:
                    response = coordinator_pb2.WatchTasksResponse()
                if response is None:
                    return
                yield response
        finally:
            if centre.watching.get(hospital) is queue:
                del centre.watching[hospital]

    async def _take(self, kind: str, request: Any) -> None:
        await self._centre.faults.enter(kind)
        refusal = self._centre.refuse.get(kind)
        self._centre.reports.append((caller().name, kind, request))
        await self._centre.notify()
        if refusal is not None:
            raise refusal
        self._centre.faults.leave(kind)

    async def ReportReady(self, request: Any, _context: Any) -> Any:
        await self._take("ready", request)
        return coordinator_pb2.ReportReadyResponse()

    async def SubmitShares(self, request: Any, _context: Any) -> Any:
        await self._take("shares", request)
        return coordinator_pb2.SubmitSharesResponse()

    async def ConfirmSurvivors(self, request: Any, _context: Any) -> Any:
        await self._take("confirm", request)
        return coordinator_pb2.ConfirmSurvivorsResponse()

    async def SubmitReveal(self, request: Any, _context: Any) -> Any:
        await self._take("reveal", request)
        return coordinator_pb2.SubmitRevealResponse()

    async def ReportUpload(self, request: Any, _context: Any) -> Any:
        await self._take("uploaded", request)
        return coordinator_pb2.ReportUploadResponse()

    async def SubmitDigest(self, request: Any, _context: Any) -> Any:
        await self._take("digest", request)
        return coordinator_pb2.SubmitDigestResponse()

    async def SubmitState(self, request: Any, _context: Any) -> Any:
        await self._take("state", request)
        return coordinator_pb2.SubmitStateResponse()

    async def AttestState(self, request: Any, _context: Any) -> Any:
        await self._take("attest", request)
        return coordinator_pb2.AttestStateResponse()

    async def DeclineJob(self, request: Any, _context: Any) -> Any:
        await self._take("decline", request)
        return coordinator_pb2.DeclineJobResponse()


def _key(message: Any) -> Key:
    return message.attempt.job_id, message.attempt.round, message.attempt.attempt
