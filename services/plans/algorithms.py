"""How a plan trains: one class for each kind of algorithm, with the rules that a plan of that kind must keep.

The registry of kinds is the union `Algorithm` at the end; the arithmetic of each kind is in
`services/hospital_node/training/families`, in a file of its own. docs/learning.md explains when to use which.
"""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer

from services.plans.document import Seconds, Strict, without_null
from services.plans.models import MAX_VECTOR_LENGTH, IntegerVector, LogisticModel, MlpModel
from services.plans.schema import Identifier

if TYPE_CHECKING:
    from services.plans.manifest import PlanManifest

Rate = Annotated[float, Field(gt=0, le=1e4)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
FamilyName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]


class AlgorithmKind(Strict):
    """What every kind of algorithm says about itself."""

    # Why a plan of this kind cannot have privacy: only a sum of one vector a patient can be clipped by patient.
    no_privacy: ClassVar[str | None] = "its contribution has no bound for one patient"
    # The state has a second moment besides the momentum slot.
    second_moment: ClassVar[bool] = False

    def train_length(self, weights: int) -> int:
        """Coordinates of the training part for a model of `weights` parameters."""
        return weights

    def refusal(self, plan: "PlanManifest") -> str | None:
        """Why the kind cannot train the rest of the plan; None when it can."""
        if isinstance(plan.model, IntegerVector):
            return "model.family = 'integer_vector' and algorithm.kind = 'sum_only' go together"
        return None


class LocalTraining(AlgorithmKind):
    """`local_steps` full-batch gradient steps with momentum at each hospital.

    Hospitals send how far they moved, times their number of training rows, and that number: the mean is weighted by
    rows and the centre sees neither. Several local steps have no usable per-patient sensitivity, and the number of rows
    is exact: refused when the plan has privacy.
    """

    no_privacy: ClassVar[str | None] = (
        "what several local steps send has no bound for one patient, and is weighted by exact numbers of rows; use "
        "'gradient_descent' (one noised and charged step a round) or 'ridge', or set privacy to null"
    )

    local_steps: Annotated[int, Field(ge=1, le=1000)]
    learning_rate: Rate
    momentum: Momentum = 0.0

    def train_length(self, weights: int) -> int:
        """The weights, and one more for the number of training rows."""
        return weights + 1


class FedAvg(LocalTraining):
    """Federated averaging (McMahan et al. 2017): the mean movement is applied with `server_learning_rate` and
    momentum.

    With `target_s` every hospital makes as many of the steps as it can in so many seconds, by its own measurement, and
    scales its movement to `local_steps` (FedNova, Wang et al. 2020): the number itself never leaves it.
    """

    kind: Literal["fedavg"]
    server_learning_rate: Rate = 1.0
    server_momentum: Momentum = 0.0
    target_s: Seconds | None = None

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(handler(self), "target_s")


class FedProx(LocalTraining):
    """Federated averaging whose local steps minimise the loss plus mu / 2 * |w - shared|^2 (Li et al. 2020): hospitals
    that differ drift apart less. mu = 0 is federated averaging."""

    kind: Literal["fedprox"]
    mu: Annotated[float, Field(ge=0, le=1e4)]
    server_learning_rate: Rate = 1.0
    server_momentum: Momentum = 0.0


class AdaptiveServer(LocalTraining):
    """The server step of Reddi et al. (2021), algorithm 2, on the mean movement D of the hospitals:
    m = beta1 m + (1 - beta1) D, a second moment v, and w = w + server_learning_rate * m / (sqrt(v) + tau).

    m starts at 0, v at tau^2; there is no bias correction. Both are part of the sealed state.
    """

    second_moment: ClassVar[bool] = True

    server_learning_rate: Rate
    beta1: Momentum = 0.9
    beta2: Momentum = 0.99
    tau: Annotated[float, Field(ge=1e-6, le=1e3)] = 1e-3


class FedAdam(AdaptiveServer):
    """v = beta2 v + (1 - beta2) D^2."""

    kind: Literal["fedadam"]


class FedYogi(AdaptiveServer):
    """v = v - (1 - beta2) D^2 sign(v - D^2): a large D cannot make v forget at once."""

    kind: Literal["fedyogi"]


class PatientSum(AlgorithmKind):
    """The contribution is a sum over patients of one vector each: the sum or the mean of the vectors of the patient's
    encounters. With privacy each patient's vector is clipped.

    The sum is divided by `expected_patients`, a public constant: the true number of patients is private.
    """

    no_privacy: ClassVar[str | None] = None

    expected_patients: Annotated[int, Field(ge=1, le=10**9)]
    patient_aggregation: Literal["sum", "mean"] = "mean"

    def largest_coordinate(self, plan: "PlanManifest") -> float | None:
        """Upper bound of a coordinate of one encounter's vector by the schema's bounds alone; None if there is none."""
        return None


class GradientDescent(PatientSum):
    """One full-batch gradient step a round, with momentum at the server. With privacy: DP gradient descent.

    The model that is served is the mean of the last `average_last` iterates (Polyak and Juditsky 1992): averaging is
    free post-processing and takes noise out; 1 turns it off.
    """

    kind: Literal["gradient_descent"]
    learning_rate: Rate
    momentum: Momentum = 0.0
    average_last: Annotated[int, Field(ge=1, le=10_000)] = 1

    def largest_coordinate(self, plan: "PlanManifest") -> float | None:
        # The gradient of a logistic model is the features times a residual of at most 1.
        return plan.largest_feature if isinstance(plan.model, LogisticModel) else None


class Ridge(PatientSum):
    """Ridge regression in one round from sufficient statistics: X'X and X'(y - p), p the public rate of the outcome.

    With privacy one release carries the whole budget. The result is put on the scale of log-odds: it is the first
    Newton step of logistic regression from a model that knows `initial_intercept` only, and ranks as ridge regression
    on the outcome does. `moment_weight` multiplies X'(y - p) before clipping and noise and divides it afterwards: noise
    is the same on every coordinate, and X'(y - p) may need more of the budget than X'X.
    """

    kind: Literal["ridge"]
    moment_weight: Annotated[float, Field(ge=1e-3, le=1e3)] = 1.0

    def train_length(self, weights: int) -> int:
        """The upper triangle of X'X, diagonal included, then X'(y - p)."""
        return weights * (weights + 1) // 2 + weights

    def largest_coordinate(self, plan: "PlanManifest") -> float | None:
        return max(plan.largest_feature**2, self.moment_weight * plan.largest_feature)

    def refusal(self, plan: "PlanManifest") -> str | None:
        if isinstance(plan.model, MlpModel):
            return "algorithm.kind = 'ridge' solves linear models only: use model.family = 'logistic'"
        if plan.rounds.count != 1:
            return f"rounds.count = {plan.rounds.count}: algorithm.kind = 'ridge' needs exactly 1 round"
        if plan.metrics is not None:
            return (
                "metrics must be null with algorithm.kind = 'ridge': a round measures the model that it starts from, "
                "and before the only round nothing has been learnt"
            )
        if isinstance(plan.model, LogisticModel) and plan.model.l2 <= 0:
            return "model.l2 must be above 0 with algorithm.kind = 'ridge': without it the solution need not exist"
        return super().refusal(plan)


class InstalledFamily(PatientSum):
    """An algorithm that a hospital's admin installed as a Python package, under the name `family` of the entry point
    group `fedmesh.plan_families`. The plan carries its parameters, never code; a hospital that did not install and
    allow the family refuses the plan.

    The package gives a vector of `length` coordinates for one encounter, and the next weights from the sum; fedmesh
    adds up encounters by patient, clips, rounds and noises as for every other kind.
    """

    kind: Literal["installed"]
    family: FamilyName
    length: Annotated[int, Field(ge=1, le=MAX_VECTOR_LENGTH)]
    parameters: Annotated[dict[Identifier, float | bool | str], Field(max_length=100)] = Field(default_factory=dict)

    def train_length(self, weights: int) -> int:
        """As the plan says; hospitals check it against the package."""
        return self.length


class SumOnly(AlgorithmKind):
    """The sum is all there is; the next state is the mean of the contributions. Only for `integer_vector`."""

    kind: Literal["sum_only"]

    def refusal(self, plan: "PlanManifest") -> str | None:
        if not isinstance(plan.model, IntegerVector):
            return "model.family = 'integer_vector' and algorithm.kind = 'sum_only' go together"
        return None


Algorithm = Annotated[
    FedAvg | FedProx | FedAdam | FedYogi | GradientDescent | Ridge | InstalledFamily | SumOnly,
    Field(discriminator="kind"),
]
