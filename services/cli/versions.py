"""Which version a person means, and everything that the registry has of it."""

import re
from dataclasses import dataclass
from typing import Any, Final

from fedmesh.registry.v1 import promotion_pb2 as pm
from fedmesh.registry.v1 import registry_pb2

from services.cli.lineage import Recorded
from services.cli.mesh import PATIENCE_S
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.hospital_node.noise import training_noise
from services.plans.manifest import PlanManifest, read_manifest, schema_sha256
from services.secure_sum.roster import as_roster

_NUMBERED: Final = re.compile(r"([0-9a-f][0-9a-f-]{3,35})/([0-9]{1,9})")
_NAMED: Final = re.compile(r"(?:([a-z0-9][a-z0-9-]*)@)?([a-z0-9][a-z0-9-]*)")
_PAGE: Final = 500


@dataclass(frozen=True)
class Registry:
    """The registry's two services."""

    versions: Any
    promotion: Any


async def find_version(registry: Registry, text: str) -> tuple[str, int]:
    """(job, version) that `text` means: JOB/NUMBER with the job's first characters, or [MODEL@]ALIAS.

    Raises: FedmeshError(INVALID_ARGUMENT) for other text or one that means several, (NOT_FOUND).
    """
    if numbered := _NUMBERED.fullmatch(text):
        return await find_job(registry.versions, numbered[1]), int(numbered[2])
    named = _NAMED.fullmatch(text)
    if named is None:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{text!r} is no version: use JOB/NUMBER, an alias, or MODEL@ALIAS")
    model, alias = named[1] or "", named[2]
    answer = await call(registry.promotion.ListAliases, pm.ListAliasesRequest(model=model), patience_s=PATIENCE_S)
    found = [one for one in answer.aliases if one.alias == alias]
    if not found:
        raise FedmeshError(Code.NOT_FOUND, f"no version is known as {text}: see `fedmesh models aliases`")
    if len(found) > 1:
        names = ", ".join(f"{one.model}@{alias}" for one in found)
        raise FedmeshError(Code.INVALID_ARGUMENT, f"{alias} is an alias of several models: {names}")
    return str(found[0].job_id), int(found[0].version)


async def find_job(versions: Any, start: str) -> str:
    """The id of the job that begins with `start`, asked of the registry's stub.

    Raises: FedmeshError(NOT_FOUND), (INVALID_ARGUMENT) when several do.
    """
    if len(start) == 36:
        return start
    jobs = (await call(versions.ListJobs, registry_pb2.ListJobsRequest(page_size=_PAGE))).jobs
    found = [job.job_id for job in jobs if job.job_id.startswith(start)]
    if len(found) != 1:
        raise FedmeshError(
            Code.NOT_FOUND if not found else Code.INVALID_ARGUMENT,
            f"{len(found)} of the newest {_PAGE} jobs begin with {start}: see `fedmesh jobs`",
        )
    return str(found[0])


async def read_recorded(registry: Registry, text: str) -> Recorded:
    """Everything that the registry has of a version. Raises: as `find_version`."""
    job_id, number = await find_version(registry, text)
    versions = registry.versions
    asked = registry_pb2.GetModelVersionRequest(job_id=job_id, version=number)
    version = (await call(versions.GetModelVersion, asked, patience_s=PATIENCE_S)).model_version
    plan = (await call(versions.GetPlan, registry_pb2.GetPlanRequest(plan_id=version.plan_id))).plan
    job = (await call(versions.GetJob, registry_pb2.GetJobRequest(job_id=job_id))).job
    said = await call(registry.promotion.GetProvenance, pm.GetProvenanceRequest(job_id=job_id, version=number))
    rosters = (await call(versions.ListRosters, registry_pb2.ListRostersRequest())).rosters
    size = next((as_roster(one.statement).size for one in rosters if one.sha256 == job.roster_sha256), 0)
    manifest = read_manifest(plan.manifest)
    return Recorded(
        version=version,
        plan=plan,
        manifest=manifest,
        job=job,
        rounds=await _rounds(versions, job_id, number),
        provenance=said,
        schema_sha256=schema_sha256(manifest),
        roster_size=size,
        epsilon_spent=_spent(manifest, size, max((one.charged for one in said.charges), default=0)),
    )


async def _rounds(versions: Any, job_id: str, last: int) -> tuple[registry_pb2.CommittedRound, ...]:
    found: list[registry_pb2.CommittedRound] = []
    while not found or found[-1].version < last:
        after = found[-1].version if found else 0
        request = registry_pb2.ListRoundsRequest(job_id=job_id, after_version=after, page_size=_PAGE)
        page = (await call(versions.ListRounds, request)).rounds
        if not page:
            break
        found.extend(page)
    return tuple(done for done in found if done.version <= last)


def _spent(manifest: PlanManifest, roster_size: int, charged: int) -> float | None:
    """Epsilon of the most often charged hospital's patients; None where nothing is known of it."""
    if manifest.privacy is None or not (charged and roster_size):
        return None
    return training_noise(manifest, roster_size).epsilon_after(charged)
