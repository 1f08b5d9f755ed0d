"""The two steps of a promotion, as operators take them, and the registry's services that they need."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fedmesh.registry.v1 import promotion_pb2 as pm
from fedmesh.registry.v1 import promotion_pb2_grpc, registry_pb2_grpc

from services.cli.centre import Centre
from services.cli.mesh import PATIENCE_S, connect
from services.cli.versions import Registry
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.common.grpc.server import MAX_RECORD_BYTES
from services.common.ids import new_id


@asynccontextmanager
async def registry_as(centre: Centre, operator: str) -> AsyncIterator[Registry]:
    """The registry of a centre, called with an operator's certificate."""
    async with connect(centre, "registry", operator=operator, max_message_bytes=MAX_RECORD_BYTES) as channel:
        yield Registry(
            channel.stub(registry_pb2_grpc.RegistryServiceStub), channel.stub(promotion_pb2_grpc.PromotionServiceStub)
        )


async def propose(registry: Registry, job_id: str, version: int, alias: str, reason: str = "") -> pm.Promotion:
    """Propose to promote a version. reason: why the divergence check of one that a roll-back took away is set aside.

    Raises: FedmeshError(PRIVACY_REFUSED | WRONG_STATE) naming what blocks it, (INVALID_ARGUMENT) for a reason with
        nothing to set aside.
    """
    request = pm.ProposePromotionRequest(
        request_id=new_id(), job_id=job_id, version=version, alias=alias, reason=reason
    )
    answer: pm.ProposePromotionResponse = await call(
        registry.promotion.ProposePromotion, request, patience_s=PATIENCE_S
    )
    return answer.promotion


async def approve(registry: Registry, job_id: str, version: int, alias: str) -> pm.Promotion:
    """Approve the newest open proposal of a version.

    Raises: FedmeshError(NOT_FOUND) when there is none, (PERMISSION_DENIED) for the one who proposed, (WRONG_STATE)
        when a check blocks by now.
    """
    asked = pm.GetProvenanceRequest(job_id=job_id, version=version)
    known = (await call(registry.promotion.GetProvenance, asked, patience_s=PATIENCE_S)).promotions
    waiting = [one for one in known if one.alias == alias and not one.approved_by]
    if not waiting:
        raise FedmeshError(Code.NOT_FOUND, f"nobody has proposed {job_id}/{version} for {alias}")
    request = pm.ApprovePromotionRequest(request_id=new_id(), promotion_id=waiting[0].promotion_id)
    answer: pm.ApprovePromotionResponse = await call(
        registry.promotion.ApprovePromotion, request, patience_s=PATIENCE_S
    )
    return answer.promotion
