"""Plans: proposed by one person, approved by another."""

from dataclasses import replace

from services.common.clock import Clock
from services.common.errors import Code, FedmeshError
from services.common.identity import Identity
from services.plans.manifest import parse_manifest, plan_id
from services.registry.domain.entities import Page, Plan, PlanStatus
from services.registry.domain.events import event
from services.registry.domain.rules import require_second_person
from services.registry.usecases.mutation import Mutations
from services.registry.usecases.ports import Command, Store, Transaction


class PlanUseCases:
    def __init__(self, store: Store, mutations: Mutations, clock: Clock) -> None:
        self._store = store
        self._mutations = mutations
        self._clock = clock

    async def create(self, command: Command[Plan], manifest_bytes: bytes) -> bytes:
        """Check and store a plan; a manifest that is known gives the plan as it stands.

        Raises: FedmeshError(PLAN_INVALID).
        """
        manifest = parse_manifest(manifest_bytes)
        plan = Plan(
            plan_id=plan_id(manifest),
            name=manifest.name,
            manifest=manifest_bytes,
            rounds=manifest.rounds.count,
            private=manifest.privacy is not None,
            status=PlanStatus.PROPOSED,
            proposed_by=str(command.caller),
            approved_by=None,
            created_at=self._clock.now(),
            parameter_set=manifest.encoding.parameter_set,
        )

        async def body(tx: Transaction) -> Plan:
            known = await tx.plans.get(plan.plan_id)
            if known is not None:
                return known
            await tx.plans.add(plan)
            subject = f"plan/{plan.plan_id}"
            facts = {"plan_name": plan.name, "rounds": plan.rounds, "private": plan.private}
            await tx.outbox.add([event("plan.proposed", plan.created_at, command.caller, subject, **facts)])
            return plan

        return await self._mutations.run(command, body)

    async def approve(self, command: Command[Plan], wanted: str) -> bytes:
        """Approve a plan; approving it again changes nothing.

        Raises: FedmeshError(NOT_FOUND), (PERMISSION_DENIED) for its author.
        """

        async def body(tx: Transaction) -> Plan:
            plan = _found(await tx.plans.get(wanted, lock=True), wanted)
            require_second_person(plan, str(command.caller))
            if plan.status is PlanStatus.APPROVED:
                return plan
            await tx.plans.approve(wanted, str(command.caller))
            told = event(
                "plan.approved",
                self._clock.now(),
                command.caller,
                f"plan/{wanted}",
                plan_name=plan.name,
                proposed_by=plan.proposed_by,
            )
            await tx.outbox.add([told])
            return replace(plan, status=PlanStatus.APPROVED, approved_by=str(command.caller))

        return await self._mutations.run(command, body)

    async def get(self, caller: Identity, wanted: str) -> Plan:
        """Raises: FedmeshError(NOT_FOUND)."""
        return _found(await self._store.ask("GetPlan", caller, lambda tx: tx.plans.get(wanted)), wanted)

    async def list(self, caller: Identity, size: int, before: int | None) -> Page[Plan]:
        return await self._store.ask("ListPlans", caller, lambda tx: tx.plans.page(size, before))


def _found(plan: Plan | None, wanted: str) -> Plan:
    if plan is None:
        raise FedmeshError(Code.NOT_FOUND, f"there is no plan {wanted}")
    return plan
