"""Plans that differ from a given one in a single respect."""

import json

from services.common.errors import Code, FedmeshError
from services.plans.document import validate
from services.plans.manifest import PlanManifest, canonical_bytes


def with_colluders(plan: PlanManifest, colluders: int | None) -> PlanManifest:
    """The plan with a guarantee against so many colluding hospitals; None: as it is.

    Raises: FedmeshError(PLAN_INVALID) for a plan without privacy or a number that no plan may have.
    """
    if colluders is None:
        return plan
    if plan.privacy is None:
        raise FedmeshError(
            Code.PLAN_INVALID, f"plan {plan.name} has no privacy, so there is no guarantee against colluders to choose"
        )
    changed = json.loads(canonical_bytes(plan))
    changed["privacy"]["colluders"] = colluders
    return validate(PlanManifest, changed, f"plan {plan.name}", Code.PLAN_INVALID)
