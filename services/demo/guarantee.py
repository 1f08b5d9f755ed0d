"""What the hospitals of a demonstration agree to: as much as its plan asks for, whatever a real one would say."""

from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.hospital_node.noise import training_noise
from services.plans.manifest import PlanManifest
from services.privacy.approval import Approval, ApproverKey, add_signature, read_approval
from services.privacy.budget import DEFAULT_LIMIT
from services.secure_sum.cohort import colluders


def lowered_guarantee(plan: PlanManifest, hospitals: int) -> str:
    """What there is to say when a plan is made against fewer colluders than the hospitals tolerate; else empty.

    Raises: FedmeshError(PRIVACY_REFUSED) for a guarantee that so few hospitals cannot give.
    """
    if plan.privacy is None:
        return ""
    noise = training_noise(plan, hospitals)
    found, most = noise.guarantee.colluders, colluders(hospitals)
    if found == most:
        return ""
    against = f"If {found + 1} pool what they know with the centre, epsilon is {noise.epsilon_against(found + 1):.3f}."
    return (
        f"The guarantee is {noise.guarantee}: [yellow]against f = {found} colluding hospitals instead of "
        f"{most}[/yellow]. {against} The hospitals of this demonstration agree to that (privacy.least_colluders: "
        f"{found}); by default they refuse it."
    )


def hospital_privacy(folder: Path, plan: PlanManifest, hospital_id: str, population: str) -> dict[str, Any]:
    """The section `privacy` of a hospital's configuration. folder: where an approval that it needs is written."""
    if plan.privacy is None:
        return {"allow_without_privacy": True}
    # Each demonstration has its own ledgers, made anew: the limit is what this run asks for.
    epsilon = max(DEFAULT_LIMIT.epsilon, plan.privacy.epsilon)
    settings: dict[str, Any] = {"epsilon_limit": epsilon, "max_plan_epsilon": epsilon}
    if plan.privacy.colluders is not None:
        settings["least_colluders"] = plan.privacy.colluders
    if epsilon > DEFAULT_LIMIT.epsilon:
        settings |= _approved(folder, Approval(hospital_id, population, epsilon, DEFAULT_LIMIT.delta))
    return settings


def _approved(folder: Path, approval: Approval) -> dict[str, Any]:
    """The settings that let a hospital of the demonstration spend more than the default.

    Two people are played by two keys that are forgotten at once.
    """
    file = folder / f"{approval.hospital_id}.approval"
    keys = [ApproverKey(name, Ed25519PrivateKey.generate()) for name in ("demo-admin", "demo-second")]
    for key in keys:
        add_signature(file, approval, key, read_approval)
    return {"approval": str(file.absolute()), "approvers": {key.name: key.public for key in keys}}
