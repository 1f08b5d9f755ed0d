"""`fedmesh audit receipt`: a hospital takes the proof that its ciphertext was counted, and checks it at once."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from fedmesh.audit.v1 import audit_pb2, audit_pb2_grpc
from fedmesh.registry.v1 import registry_pb2, registry_pb2_grpc
from rich.console import Console

from services.cli.centre import stack_dir
from services.cli.mesh import PATIENCE_S, awake
from services.cli.stack import DEMO_DIR, Folder
from services.cli.witnesses import look_at
from services.common.config import load_config
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import MeshChannel, call
from services.hospital_node.config import HospitalConfig, WitnessConfig, read_log_key
from services.hospital_node.domain.tasks import AttemptId
from services.hospital_node.store.attempts import read_ciphertext_sha256
from services.hospital_node.store.witness import STATE_FILE
from services.secure_sum.roster import Roster, load_roster_file
from services.transparency.checkpoint import VerifierKey
from services.transparency.receipt import (
    MAX_BYTES,
    Counted,
    Place,
    Receipt,
    Verified,
    contribution_place,
    counted_lines,
    parse_receipt,
    verify_receipt,
)
from services.transparency.witness import follow


@dataclass(frozen=True)
class Asker:
    """Who asks, with what it trusts by itself: founding roster and log key."""

    config: HospitalConfig
    witness: WitnessConfig
    founding: Roster
    verifier: VerifierKey

    def require_sent(self, counted: Counted) -> None:
        """Raises: FedmeshError(PROOF_INVALID) when the centre counted something else than this hospital sent."""
        attempt = AttemptId(counted.job_id, counted.version, counted.attempt)
        sent = read_ciphertext_sha256(self.config.data_dir / STATE_FILE, attempt)
        if sent != counted.ciphertext_sha256:
            raise FedmeshError(
                Code.PROOF_INVALID,
                f"the centre counted the ciphertext {counted.ciphertext_sha256} in attempt {counted.attempt}, "
                f"this hospital sent {sent or 'none that it knows of'}",
            )


def receipt(
    job: Annotated[str, typer.Argument(help="The job's id: see `fedmesh jobs`")],
    version: Annotated[int, typer.Argument(min=1, help="The version that the contribution went into")],
    out: Annotated[Path, typer.Option("--out", help="New file for the receipt")],
    config: Annotated[Path | None, typer.Option(help="Configuration file of the hospital's node")] = None,
    hospital: Annotated[str, typer.Option(help="A hospital of the stack, instead of --config")] = "",
    folder: Folder = DEMO_DIR,
) -> None:
    """Get a hospital's receipt for one version, check it, and write it. Needs a witnessed checkpoint over the round.

    `fedmesh audit verify FILE --key KEY --roster ROSTER` checks it again anywhere, with no server.
    """
    if (config is None) == (not hospital):
        raise FedmeshError(Code.INVALID_ARGUMENT, "name the hospital: by --config FILE, or by --hospital in a stack")
    if config is not None:
        verified = asyncio.run(take(read_asker(config), job, version, out))
    else:
        path = stack_dir(folder) / "config" / f"{hospital}.yaml"
        with awake(stack_dir(folder), ("audit", "registry")) as stack:
            if not path.is_file():
                raise FedmeshError(Code.NOT_FOUND, f"no hospital {hospital} ever ran in {folder}")
            # A stack that slept wakes on other ports than those in the hospital's file.
            targets = {name: stack.target(name) for name in ("registry", "audit")}
            verified = asyncio.run(take(read_asker(path, targets), job, version, out))
    Console().print(f"[green]OK[/green] {verified.statement} Receipt: {out}", highlight=False, soft_wrap=True)


def verify_file(path: Path, verifier: VerifierKey, roster: Path) -> Verified:
    """Check a receipt with no help from any server.

    Raises: FedmeshError(PROOF_INVALID) saying which link does not hold; (CONFIG_INVALID) for the roster's file.
    """
    with path.open("rb") as file:
        return verify_receipt(parse_receipt(file.read(MAX_BYTES + 1)), verifier, load_roster_file(roster))


def read_asker(path: Path, targets: dict[str, str] | None = None) -> Asker:
    """The hospital of a configuration file. targets: addresses of registry and audit, instead of the file's.

    Raises: FedmeshError(CONFIG_INVALID).
    """
    config = load_config(HospitalConfig, path)
    if config.witness is None:
        raise FedmeshError(Code.CONFIG_INVALID, f"{path} has no section `witness`: which log, under which key?")
    if targets is not None:
        values = config.model_dump()
        values["registry"]["target"] = targets["registry"]
        values["witness"]["audit"]["target"] = targets["audit"]
        config = HospitalConfig.model_validate(values)
    assert config.witness is not None
    founding = load_roster_file(config.roster)
    verifier = read_log_key(config.witness, founding.statement.consortium)
    return Asker(config, config.witness, founding, verifier)


async def take(asker: Asker, job: str, version: int, out: Path) -> Verified:
    """Get a receipt from the centre, check it, and write it into a new file.

    Raises: FedmeshError(NOT_FOUND) when nothing of the hospital was counted in that version, (WRONG_STATE) when the
        round is not in the log or not witnessed yet, (PROOF_INVALID) when the centre's answers do not prove it.
    """
    tls = asker.config.tls
    async with (
        MeshChannel(asker.config.registry.target, tls) as to_registry,
        MeshChannel(asker.witness.audit.target, tls) as to_audit,
    ):
        made = await _make(
            asker,
            to_registry.stub(registry_pb2_grpc.RegistryServiceStub),
            to_audit.stub(audit_pb2_grpc.AuditServiceStub),
            job,
            version,
        )
    verified = verify_receipt(made, asker.verifier, asker.founding)
    try:
        with out.open("xb") as file:
            file.write(made.to_json())
    except OSError as error:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"cannot write {out}: {error.strerror}") from error
    return verified


async def _make(asker: Asker, registry: Any, audit: Any, job: str, version: int) -> Receipt:
    listed = await _contributions(registry, job, version)
    mine = [item for item in listed if item.hospital_id == asker.config.hospital_id]
    if len(mine) != 1:
        raise FedmeshError(Code.NOT_FOUND, f"{asker.config.hospital_id} has no contribution in version {version}")
    asker.require_sent(mine[0])
    request = registry_pb2.GetRoundEntryRequest(job_id=job, version=version)
    index = (await call(registry.GetRoundEntry, request, patience_s=PATIENCE_S)).index
    answer = await call(registry.ListRosters, registry_pb2.ListRostersRequest(after_version=1))
    signed = tuple(
        (item.statement, {one.hospital_id: one.signature for one in item.signatures}) for item in answer.rosters
    )
    seen = await look_at(audit, asker.verifier, follow(asker.founding, signed))
    if seen.best is None or seen.best[1].size <= index:
        size = 0 if seen.best is None else seen.best[1].size
        raise FedmeshError(
            Code.WRONG_STATE,
            f"the round is entry {index} of the log, and {size} entries are witnessed: come again when more are",
        )
    note, checkpoint, witnessed = seen.best
    found = await call(audit.GetEntry, audit_pb2.GetEntryRequest(index=index, tree_size=checkpoint.size))
    return Receipt(
        counted=mine[0],
        contribution=contribution_place([item.leaf() for item in listed], listed.index(mine[0])),
        leaf=bytes(found.leaf),
        entry=Place(index, checkpoint.size, tuple(found.hashes)),
        checkpoint=counted_lines(note, asker.verifier, witnessed),
        rosters=signed,
    )


async def _contributions(registry: Any, job: str, version: int) -> list[Counted]:
    request = registry_pb2.ListRoundsRequest(job_id=job, after_version=version - 1, page_size=1)
    rounds = (await call(registry.ListRounds, request, patience_s=PATIENCE_S)).rounds
    if not rounds or rounds[0].version != version:
        raise FedmeshError(Code.NOT_FOUND, f"job {job} has no version {version} yet")
    if rounds[0].burnt:
        raise FedmeshError(Code.NOT_FOUND, f"version {version} was burnt: nothing was counted in it")
    listed = [
        Counted(job, version, rounds[0].attempt.attempt, item.hospital_id, item.ciphertext_sha256)
        for item in rounds[0].contributions
    ]
    return sorted(listed, key=lambda item: item.hospital_id)
