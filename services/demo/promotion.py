"""The demonstration's last version: what was checked of it, two people who promote it, a hospital that pulls it."""

import asyncio
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fedmesh.registry.v1 import promotion_pb2 as pm

from services.cli.promoting import approve, propose, registry_as
from services.cli.pull import fetch, write
from services.cli.receipts import read_asker
from services.common.errors import Code, FedmeshError
from services.common.grpc.client import call
from services.embedded.stack import Stack
from services.hospital_node.noise import training_noise
from services.hospital_node.training.checking import FULL_LANE
from services.plans.checks import Checks
from services.plans.manifest import PlanManifest

ALIAS: Final = "production"
# Every hospital reports within seconds; one that is gone never does.
REPORTS_PATIENCE_S: Final = 60.0
LATECOMERS_S: Final = 5.0
# Witnesses look at the log every five seconds.
WITNESSES_PATIENCE_S: Final = 60.0
LOOK_S: Final = 0.5

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Checked:
    """One check. value, limit: what it was judged by; None where it is not about a number. at_least: the limit is a
    lower one. signed_by: how many hospitals signed it; 0 for the registry's own.
    """

    check: str
    passed: bool
    reason: str
    value: float | None
    limit: float | None
    at_least: bool
    signed_by: int

    def as_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "value": self.value,
            "limit": self.limit,
            "limit_is": "least" if self.at_least else "largest",
            "made_by": f"{self.signed_by} hospitals" if self.signed_by else "registry",
            "reason": self.reason,
        }


@dataclass(frozen=True)
class Promotion:
    """What came of the checks. proposed_by, approved_by: empty when a check blocked. pulled: what a hospital verified,
    in words."""

    version: int
    checks: tuple[Checked, ...]
    proposed_by: str = ""
    approved_by: str = ""
    pulled_by: str = ""
    pulled: str = ""

    @property
    def promoted(self) -> bool:
        return bool(self.approved_by)

    def as_dict(self) -> dict[str, Any]:
        return {
            "checks": {item.check: item.as_dict() for item in self.checks},
            "alias": ALIAS if self.promoted else None,
            "version": self.version,
            "proposed_by": self.proposed_by or None,
            "approved_by": self.approved_by or None,
            "pulled_by": self.pulled_by or None,
        }


async def promote(
    stack: Stack,
    plan: PlanManifest,
    job_id: str,
    hospitals: int,
    people: tuple[str, str],
    waiting: Callable[[int], None],
) -> Promotion:
    """Wait for the hospitals' signed reports on a finished job and, if all checks passed, promote its last version.

    people: the operators who propose and approve. waiting: told how many hospitals have reported.

    Raises: FedmeshError: the registry is away, or another check blocks at the approval than before.
    """
    async with registry_as(stack, people[0]) as registry, registry_as(stack, people[1]) as second:
        said = await _reported(registry.promotion, job_id, hospitals, waiting)
        version = plan.rounds.count
        checks = judged(plan, hospitals, said.checks)
        if not all(item.passed for item in checks):
            return Promotion(version, checks)
        await propose(registry, job_id, version, ALIAS)
        done = await approve(second, job_id, version, ALIAS)
    names = [who.rpartition("/")[2] for who in (done.proposed_by, done.approved_by)]
    return Promotion(version, checks, *names)


async def _reported(
    promotion: Any, job_id: str, hospitals: int, waiting: Callable[[int], None]
) -> pm.GetProvenanceResponse:
    """What the registry has of the job's last version, once every hospital reported its checks and its charges.

    A hospital that is gone is waited for a while only: t of them decide.
    """
    started = time.monotonic()
    passed_at = None
    while True:
        said: pm.GetProvenanceResponse = await call(
            promotion.GetProvenance, pm.GetProvenanceRequest(job_id=job_id), patience_s=30
        )
        waiting(len(said.reports))
        passed = all(item.outcome == pm.CHECK_OUTCOME_PASSED for item in said.checks)
        now = time.monotonic()
        passed_at = (passed_at or now) if passed else None
        late = passed_at is not None and now - passed_at > LATECOMERS_S
        complete = len(said.reports) == hospitals and _charges_known(said)
        if complete or late or now - started > REPORTS_PATIENCE_S:
            return said
        await asyncio.sleep(LOOK_S)


def _charges_known(said: pm.GetProvenanceResponse) -> bool:
    return all(json.loads(item.figures_json)["uncharged"] == 0 for item in said.checks if item.check == "budget")


async def pull(stack: Stack, plan: PlanManifest, hospital_id: str, done: Promotion) -> Promotion:
    """Let a hospital take the promoted version into its own folder, once it found that everything said of it holds.

    Raises: FedmeshError: something does not hold, or the log is not witnessed up to the promotion in time.
    """
    asker = read_asker(stack.folder / "config" / f"{hospital_id}.yaml")
    deadline = time.monotonic() + WITNESSES_PATIENCE_S
    while True:
        try:
            pulled = await fetch(asker, f"{plan.name}@{ALIAS}")
            break
        except FedmeshError as error:
            # Not in the log, or not witnessed yet.
            if error.code is not Code.WRONG_STATE or time.monotonic() > deadline:
                raise
        await asyncio.sleep(LOOK_S)
    out = stack.hospital_data(hospital_id) / "model"
    write(pulled, out, keras=False)
    claim = pulled.claim
    text = (
        f"statement signed by the registry, a witnessed log of {claim.moved.place.size} entries, checks signed by "
        f"{len(claim.reports)} hospitals; model in {out}"
    )
    return Promotion(done.version, done.checks, done.proposed_by, done.approved_by, hospital_id, text)


def judged(plan: PlanManifest, hospitals: int, found: Sequence[pm.Check]) -> tuple[Checked, ...]:
    """The checks, each with the figure that it was judged by and the limit of that. hospitals: the roster's size."""
    figures = {item.check: json.loads(item.figures_json) for item in found}
    charged = figures.get("budget", {}).get("most_charged", 0)
    if plan.privacy is not None and charged:
        # The measuring round is one of the charged attempts, under the same noise multiplier as those that train.
        figures["privacy"]["spent"] = training_noise(plan, hospitals).epsilon_after(charged)
    return tuple(_judged(plan, item, figures[item.check]) for item in found)


def _judged(plan: PlanManifest, item: pm.Check, figures: Figures) -> Checked:
    value, limit, at_least = (None, None, False)
    if figures and plan.checks is not None:
        value, limit, at_least = _figure(item.check, figures, plan.checks)
    passed = item.outcome == pm.CHECK_OUTCOME_PASSED
    signed = len(item.signed_by) if item.made_by == "hospitals" else 0
    return Checked(item.check, passed, item.reason, value, limit, at_least, signed)


def _figure(check: str, figures: Figures, bounds: Checks) -> tuple[float | None, float | None, bool]:
    """(value, limit, whether the limit is a lower one) of a check that has figures."""
    if check == "privacy":
        return figures.get("spent"), figures["epsilon"], False
    if check == "quorum":
        return figures["least"], figures["needed"], True
    if check == "budget":
        return figures["most_charged"], figures["allowed"], False
    if check == "convergence":
        return figures["last_auroc"], figures["least_auroc"], True
    if check == "divergence":
        return figures["largest_fall"], figures["allowed"], False
    if check == "saturation":
        return figures["peak"], FULL_LANE, False
    if check == "membership-inference":
        return max(figures.values()), bounds.largest_attack_auc, False
    if check == "subgroups":
        groups = [value for name, value in figures.items() if name != "all"]
        return figures["all"] - min(groups), bounds.largest_subgroup_gap, False
    return None, None, False
