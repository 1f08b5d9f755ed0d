"""The gRPC surface of promotion: checks the form of requests, calls a use case, words the answer."""

from typing import Any

from fedmesh.registry.v1 import promotion_pb2 as pb
from fedmesh.registry.v1 import promotion_pb2_grpc as rpc

from services.common.grpc.gate import caller
from services.common.ids import require_name, require_uuid
from services.registry import wire, wire_promotion
from services.registry.domain.promotion import Alias, Promotion, Tag
from services.registry.usecases.ports import Command
from services.registry.usecases.promotions import PromotionUseCases


class PromotionServicer(rpc.PromotionServiceServicer):
    """Access is decided before: by the policy beside each method and by row-level security behind each query."""

    def __init__(self, usecases: PromotionUseCases) -> None:
        self._usecases = usecases

    async def SetAlias(self, request: pb.SetAliasRequest, _context: Any) -> pb.SetAliasResponse:
        command: Command[Alias] = wire.command(
            request, caller(), "SetAlias", lambda a: pb.SetAliasResponse(alias=wire_promotion.alias(a))
        )
        job_id, version = require_uuid(request.job_id, "job_id"), wire_promotion.require_version(request.version)
        alias = require_name(request.alias, "alias")
        return pb.SetAliasResponse.FromString(await self._usecases.set_alias(command, job_id, version, alias))

    async def ListAliases(self, request: pb.ListAliasesRequest, _context: Any) -> pb.ListAliasesResponse:
        model = require_name(request.model, "model") if request.model else ""
        found = await self._usecases.aliases(caller(), model)
        return pb.ListAliasesResponse(aliases=map(wire_promotion.alias, found))

    async def SetTag(self, request: pb.SetTagRequest, _context: Any) -> pb.SetTagResponse:
        command: Command[tuple[Tag, ...]] = wire.command(
            request, caller(), "SetTag", lambda tags: pb.SetTagResponse(tags=wire_promotion.tags(tags))
        )
        job_id, version = require_uuid(request.job_id, "job_id"), wire_promotion.require_version(request.version)
        key, value = require_name(request.key, "key"), wire.require_text(request.value, "value", 200)
        return pb.SetTagResponse.FromString(await self._usecases.set_tag(command, job_id, version, key, value))

    async def ReportChecks(self, request: pb.ReportChecksRequest, _context: Any) -> pb.ReportChecksResponse:
        command: Command[None] = wire.command(request, caller(), "ReportChecks", lambda _: pb.ReportChecksResponse())
        job_id, report = wire_promotion.read_report(request, caller())
        return pb.ReportChecksResponse.FromString(await self._usecases.report(command, job_id, report))

    async def ProposePromotion(self, request: pb.ProposePromotionRequest, _context: Any) -> pb.ProposePromotionResponse:
        command: Command[Promotion] = wire.command(
            request,
            caller(),
            "ProposePromotion",
            lambda p: pb.ProposePromotionResponse(promotion=wire_promotion.promotion(p)),
        )
        job_id, version = require_uuid(request.job_id, "job_id"), wire_promotion.require_version(request.version)
        alias = require_name(request.alias, "alias")
        reason = wire_promotion.require_reason(request.reason)
        proposed = await self._usecases.propose(command, job_id, version, alias, reason)
        return pb.ProposePromotionResponse.FromString(proposed)

    async def ApprovePromotion(self, request: pb.ApprovePromotionRequest, _context: Any) -> pb.ApprovePromotionResponse:
        command: Command[Promotion] = wire.command(
            request,
            caller(),
            "ApprovePromotion",
            lambda p: pb.ApprovePromotionResponse(promotion=wire_promotion.promotion(p)),
        )
        promotion_id = require_uuid(request.promotion_id, "promotion_id")
        return pb.ApprovePromotionResponse.FromString(await self._usecases.approve(command, promotion_id))

    async def GetProvenance(self, request: pb.GetProvenanceRequest, _context: Any) -> pb.GetProvenanceResponse:
        job_id, version = require_uuid(request.job_id, "job_id"), wire_promotion.require_version(request.version)
        return wire_promotion.provenance(await self._usecases.provenance(caller(), job_id, version))
