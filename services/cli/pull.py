"""`fedmesh models pull`: a hospital takes a promoted model, once everything that is said of it was found to hold."""

import asyncio
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import promotion_pb2, promotion_pb2_grpc, registry_pb2, registry_pb2_grpc
from rich.console import Console
from rich.markup import escape

from services.cli.centre import stack_dir
from services.cli.lineage import Recorded, as_json, build
from services.cli.mesh import awake
from services.cli.receipts import Asker, read_asker
from services.cli.stack import DEMO_DIR, Folder
from services.cli.versions import Registry, read_recorded
from services.cli.witnesses import look_at
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call, stream
from services.common.grpc.server import MAX_RECORD_BYTES
from services.hospital_node.config import read_membership, read_registry_key
from services.hospital_node.store.epochs import EPOCH_FOLDER, load_epoch
from services.hospital_node.usecases.states import open_newest
from services.plans.manifest import PlanManifest
from services.secure_sum.epoch import EpochKeys, open_epoch
from services.secure_sum.roster import Roster
from services.secure_sum.sealed import sealed_epoch
from services.secure_sum.statements import Signed
from services.transparency.attestation import claimed_predicate
from services.transparency.provenance import Claim, Logged, Report, require_state, verify_claim
from services.transparency.receipt import Place
from services.transparency.witness import follow

_MOST_BYTES = 1 << 30


@dataclass(frozen=True)
class Pulled:
    """A verified version: its opened state, and what was verified."""

    recorded: Recorded
    claim: Claim
    state: bytes

    @property
    def manifest(self) -> PlanManifest:
        return self.recorded.manifest


def pull(
    out: Annotated[Path, typer.Option("--out", help="New folder for the model")],
    version: Annotated[
        str, typer.Argument(help="An alias, MODEL@ALIAS, or JOB/NUMBER with the whole id of the job")
    ] = "production",
    config: Annotated[Path | None, typer.Option(help="Configuration file of the hospital's node")] = None,
    hospital: Annotated[str, typer.Option(help="A hospital of the stack, instead of --config")] = "",
    keras: Annotated[
        bool, typer.Option("--keras/--no-keras", help="Write Keras and SavedModel too; takes TensorFlow's time to load")
    ] = True,
    onnx: Annotated[bool, typer.Option("--onnx/--no-onnx", help="Write ONNX too; needs the package onnx")] = False,
    folder: Folder = DEMO_DIR,
) -> None:
    """Get a promoted model into a hospital: check signature, lineage, checks and log inclusion; open it; export it.

    Nothing is written unless everything holds.
    """
    if (config is None) == (not hospital):
        raise FedmeshError(Code.INVALID_ARGUMENT, "name the hospital: by --config FILE, or by --hospital in a stack")
    if out.exists():
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{out} is there already: name a new folder")
    if onnx:
        # Before anything is asked of anybody.
        from services.hospital_node.training.export_onnx import require_onnx

        require_onnx()
    with ExitStack() as opened:
        targets = None
        if config is None:
            stack = opened.enter_context(awake(stack_dir(folder), ("audit", "registry")))
            config = stack_dir(folder) / "config" / f"{hospital}.yaml"
            if not config.is_file():
                raise FedmeshError(Code.NOT_FOUND, f"no hospital {hospital} ever ran in {folder}")
            targets = {name: stack.target(name) for name in ("registry", "audit")}
        pulled = asyncio.run(fetch(read_asker(config, targets), version))
    write(pulled, out, keras=keras, onnx=onnx)
    _tell(pulled, out)


def _tell(pulled: Pulled, out: Path) -> None:
    claim = pulled.claim
    Console().print(
        f"[green]OK[/green] {pulled.recorded.plan.name} {claim.job_id}/{claim.version}: statement signed by the"
        f" registry, entry {claim.attested.place.index} of a witnessed log of {claim.attested.place.size} entries, the"
        f" move of {claim.alias} entry {claim.moved.place.index}, checks signed by"
        f" {len(claim.reports)} hospitals, promoted by {claim.proposed_by.rpartition('/')[2]} and"
        f" {claim.approved_by.rpartition('/')[2]}. Model: {out}",
        highlight=False,
        soft_wrap=True,
    )
    for check, reason in claimed_predicate(claim.verdict).get("waived", {}).items():
        Console().print(f"[yellow]set aside by both[/yellow]: {check}: {escape(reason)}", soft_wrap=True)


def write(pulled: Pulled, out: Path, *, keras: bool, onnx: bool = False) -> None:
    """Write the model, its statement and its lineage into a new folder."""
    from services.hospital_node.training.export import export_keras, export_names, export_numpy

    try:
        out.mkdir(parents=True)
        (out / "statement.json").write_bytes(pulled.claim.envelope)
        (out / "verdict.json").write_bytes(pulled.claim.verdict)
        (out / "plan.json").write_bytes(pulled.claim.plan)
        (out / "lineage.json").write_text(as_json(build(pulled.recorded)) + "\n", encoding="utf-8")
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {out}: {error.strerror}") from error
    export_names(pulled.manifest, out)
    export_numpy(pulled.manifest, pulled.state, out)
    if onnx:
        from services.hospital_node.training.export_onnx import export_onnx

        export_onnx(pulled.manifest, pulled.state, out)
    if keras:
        export_keras(pulled.manifest, pulled.state, out)


async def fetch(asker: Asker, version: str) -> Pulled:
    """Get a version from the centre, check all that is said of it, and open its state with the hospitals' key.

    Raises: FedmeshError(NOT_FOUND), (WRONG_STATE) when it is not promoted, or not in a witnessed log yet,
        (PROOF_INVALID | STATEMENT_INVALID | CIPHERTEXT_INVALID) when something does not hold.
    """
    key = read_registry_key(asker.config, asker.founding.statement.consortium)
    tls = asker.config.tls
    async with (
        MeshChannel(asker.config.registry.target, tls, max_message_bytes=MAX_RECORD_BYTES) as to_registry,
        MeshChannel(asker.witness.audit.target, tls) as to_audit,
    ):
        registry = Registry(
            to_registry.stub(registry_pb2_grpc.RegistryServiceStub),
            to_registry.stub(promotion_pb2_grpc.PromotionServiceStub),
        )
        recorded = await read_recorded(registry, version)
        alias = "" if "/" in version else version.rpartition("@")[2]
        claim = await _claim(asker, registry, to_audit.stub(audit_pb2_grpc.AuditServiceStub), recorded, alias)
        statement = verify_claim(claim, key, asker.verifier)
        blob = await _download(registry.versions, claim.state_sha256)
        require_state(blob, statement)
        roster = next(one for one in claim.rosters if one.sha256 == statement.predicate["roster_sha256"])
        keys = await _epoch(asker, registry.versions, roster, sealed_epoch(blob))
    _, state = open_newest(keys, claim.job_id, claim.version, blob)
    return Pulled(recorded, claim, state)


async def _claim(asker: Asker, registry: Registry, audit: Any, recorded: Recorded, alias: str) -> Claim:
    """What the centre says. alias: the one that was asked for, empty when the version was named by its number."""
    said = recorded.provenance
    done = _promotion(recorded, alias)
    if not said.HasField("attestation") or not said.attestation.HasField("index"):
        raise FedmeshError(Code.WRONG_STATE, "the audit log does not hold the version's statement yet: try again soon")
    if not done.HasField("alias_index"):
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the audit log does not hold the move of {done.alias} yet: try again soon, or promote the version once"
            " more if an earlier release moved it",
        )
    answer = await call(registry.versions.ListRosters, registry_pb2.ListRostersRequest(after_version=1))
    signed = [(item.statement, {one.hospital_id: one.signature for one in item.signatures}) for item in answer.rosters]
    rosters = follow(asker.founding, signed)
    note, size = await _witnessed(asker, audit, rosters, max(said.attestation.index, done.alias_index))
    return Claim(
        job_id=recorded.version.job_id,
        version=recorded.version.version,
        state_sha256=recorded.version.state_sha256,
        plan=bytes(recorded.plan.manifest),
        envelope=bytes(said.attestation.envelope),
        attested=await _logged(audit, said.attestation.index, size),
        alias=alias or done.alias,
        moved=await _logged(audit, done.alias_index, size),
        checkpoint=note,
        proposed_by=done.proposed_by,
        approved_by=done.approved_by,
        verdict=bytes(done.verdicts[-1]),
        reports=tuple(Report(one.hospital_id, one.statement, one.signature) for one in said.reports),
        rosters=tuple(rosters),
    )


def _promotion(recorded: Recorded, alias: str) -> promotion_pb2.Promotion:
    """The newest approved promotion of a version, to this alias if one is named."""
    approved = [one for one in recorded.provenance.promotions if one.approved_by and alias in ("", one.alias)]
    if not approved:
        to = f" to {alias}" if alias else ""
        raise FedmeshError(Code.WRONG_STATE, f"{recorded.reference} was not promoted{to}: see `fedmesh models checks`")
    return approved[0]


async def _witnessed(asker: Asker, audit: Any, rosters: list[Roster], last: int) -> tuple[str, int]:
    """A witnessed checkpoint over the entry `last`, and its size. Raises: FedmeshError(WRONG_STATE) when none is."""
    seen = await look_at(audit, asker.verifier, rosters)
    size = 0 if seen.best is None else seen.best[1].size
    if seen.best is None or size <= last:
        raise FedmeshError(
            Code.WRONG_STATE, f"the promotion is entry {last} of the log, and {size} entries are witnessed: come again"
        )
    return seen.best[0], size


async def _logged(audit: Any, index: int, size: int) -> Logged:
    found = await call(audit.GetEntry, audit_pb2.GetEntryRequest(index=index, tree_size=size))
    return Logged(bytes(found.leaf), Place(index, size, tuple(found.hashes)))


async def _download(versions: Any, sha256: str) -> bytes:
    content = bytearray()
    async for part in stream(versions.DownloadBlob, registry_pb2.DownloadBlobRequest(sha256=sha256)):
        content += part.chunk
        if len(content) > _MOST_BYTES:
            raise FedmeshError(Code.TOO_LARGE, f"the state has more than {_MOST_BYTES} bytes")
    return bytes(content)


async def _epoch(asker: Asker, versions: Any, roster: Roster, epoch: int) -> EpochKeys:
    """The keys of an epoch: the node's own copy, else what a member sealed to this hospital."""
    kept = load_epoch(asker.config.data_dir / EPOCH_FOLDER, roster.sha256, epoch)
    if kept is not None:
        return kept
    request = registry_pb2.GetEpochRequest(roster_sha256=roster.sha256, epoch=epoch)
    answer = await call(versions.GetEpoch, request)
    if not answer.HasField("epoch"):
        raise FedmeshError(Code.NOT_FOUND, f"nobody has published key epoch {epoch} of the version's roster")
    keys, _ = read_membership(asker.config)
    sealed = answer.epoch
    opened = open_epoch(Signed(sealed.hospital_id, sealed.statement, sealed.signature), keys, roster)
    if opened.epoch != epoch:
        raise FedmeshError(Code.STATEMENT_INVALID, f"the registry gave epoch {opened.epoch} for {epoch}")
    return opened
