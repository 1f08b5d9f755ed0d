"""The declarative plan: what to learn, from which features, under which privacy, in how many rounds.

A plan is data. A hospital reads it, checks it, and compiles it with the TensorFlow Federated that it installed itself;
no code travels. On disk a plan is YAML and may name its feature schema by path; on the wire it is canonical JSON with
the schema inside, and the SHA-256 of those bytes is the plan's id.
"""

import hashlib
import math
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from services.common.errors import Code, FedmeshError
from services.plans.algorithms import Algorithm, FedAvg, PatientSum
from services.plans.checks import MAX_GROUPS, Checks, group_names
from services.plans.document import (
    Seconds,
    Strict,
    canonical_json,
    parse_yaml,
    read_file,
    require_size,
    shorten,
    validate,
    validate_json,
    without_null,
)
from services.plans.encoding import Encoding
from services.plans.models import MAX_VECTOR_LENGTH, IntegerVector, LogisticModel, Model, Network
from services.plans.schema import Column, FeatureSchema, Identifier
from services.plans.staleness import MAX_AGE, WEIGHT_UNITS
from services.secure_sum.cohort import MAX_COLLUDERS

MAX_EPSILON: Final = 10.0
# Honest contributions that fit under the parameter set's plaintext modulus together with headroom.
MAX_HOSPITALS: Final = 16
# Algorithms whose update is a sum over hospitals that may carry weights.
_WEIGHTABLE: Final = frozenset({"fedavg", "fedprox", "fedadam", "fedyogi", "gradient_descent", "sum_only"})

PlanName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
Epsilon = Annotated[float, Field(gt=0, le=MAX_EPSILON)]
Delta = Annotated[float, Field(gt=0, le=1e-3)]


class Privacy(Strict):
    """Differential privacy of the training sums, for adding or removing all records of one patient at a hospital.

    Each patient's contribution is clipped to `clip_norm` (L2). Noise is calibrated for `rounds.count +
    extra_attempts` releases: a repeated attempt has fresh noise and is a release of its own.
    """

    unit: Literal["patient"]
    epsilon: Epsilon
    delta: Delta
    clip_norm: Annotated[float, Field(gt=0, le=1e6)]
    # Training encounters of one patient that take part; with more, those with the smallest SHA-256 of their id.
    max_encounters_per_patient: Annotated[int, Field(ge=1, le=1000)]
    extra_attempts: Annotated[int, Field(ge=0, le=1000)] = 0
    # f: hospitals that may pool what they know with the centre. Absent: as many as the roster tolerates.
    colluders: Annotated[int, Field(ge=0, le=MAX_COLLUDERS)] | None = None

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(handler(self), "colluders")


class Rounds(Strict):
    """How many rounds, numbered from 1 to `count`, and how long each phase may take.

    Asynchronous: a group is sealed as soon as `k` hospitals are ready (at least t by the roster, which the plan does
    not know), with contributions trained on versions up to `max_age` older than the newest, weighted by
    1 / sqrt(1 + age): FedBuff (Nguyen et al. 2022).
    """

    count: Annotated[int, Field(ge=1, le=10_000)]
    mode: Literal["synchronous", "asynchronous"] = "synchronous"
    ready_deadline_s: Seconds = 120.0
    phase_deadline_s: Seconds = 60.0
    k: Annotated[int, Field(ge=1, le=MAX_HOSPITALS)] | None = None
    max_age: Annotated[int, Field(ge=0, le=MAX_AGE)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = (self.k is not None, self.max_age is not None)
        if self.mode == "synchronous":
            return self.require(not any(given), "k and max_age must be null for mode = 'synchronous'")
        return self.require(all(given), "k and max_age are required for mode = 'asynchronous'")

    @model_serializer(mode="wrap")
    def _spelled(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_null(handler(self), "k", "max_age")

    @property
    def asynchronous(self) -> bool:
        return self.mode == "asynchronous"

    @property
    def oldest(self) -> int:
        """The greatest age of a contribution that counts."""
        return self.max_age or 0


class Metrics(Strict):
    """Validation metrics from secure-summed histograms of the score, in `score_bins` equal bins of the log-odds over
    `logit_range` (what lies outside counts in the outermost bins), one histogram for each outcome; without privacy
    also the exact sum of losses clipped at `loss_clip`. With privacy the loss is estimated from the histograms.

    Every `every_rounds` rounds and in the last round. With privacy they are a mechanism of their own on the
    validation patients, who are disjoint from the training patients: parallel composition, so a patient's total is
    the larger of the two epsilons, not their sum. Noise is calibrated for `len(metrics_rounds)` plus the plan's
    `privacy.extra_attempts` releases. It is the same on every bin, so with privacy few bins in a range where scores are
    expected say more than many.
    """

    every_rounds: Annotated[int, Field(ge=1, le=10_000)] = 1
    score_bins: Annotated[int, Field(ge=2, le=1024)] = 64
    logit_range: tuple[Annotated[float, Field(ge=-50, le=50)], Annotated[float, Field(ge=-50, le=50)]] = (-6.0, 3.0)
    loss_clip: Annotated[float, Field(gt=0, le=50)] = 6.0
    # With privacy: validation encounters of one patient that are counted. Each more costs as much noise again.
    max_encounters_per_patient: Annotated[int, Field(ge=1, le=1000)] = 1
    epsilon: Epsilon | None = None
    delta: Delta | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.logit_range
        return self.require(low < high, f"logit_range [{low}, {high}] must be [low, high]")


class Personalisation(Strict):
    """A model of each hospital's own, made by the hospital from the job's last version; it never leaves the hospital.

    `proximal_weights` are the strengths with which it is held to the shared model (Li et al. 2021, Ditto); the hospital
    chooses among them, and the shared model itself, on its validation rows. It is no release: with privacy too it costs
    nothing, and is not covered by the guarantee.
    """

    proximal_weights: Annotated[
        tuple[Annotated[float, Field(ge=1e-6, le=1e6)], ...], Field(min_length=1, max_length=16)
    ]

    @model_validator(mode="after")
    def _check(self) -> Self:
        return self.require(
            len(set(self.proximal_weights)) == len(self.proximal_weights), "proximal_weights: a weight appears twice"
        )


class PlanManifest(Strict):
    """One plan, self-contained. Build it with `load_manifest` or `parse_manifest`."""

    format: Literal["fedmesh.plan/v1"]
    name: PlanName
    description: Annotated[str, Field(max_length=2000)] = ""
    model: Model
    algorithm: Algorithm
    privacy: Privacy | None
    rounds: Rounds
    encoding: Encoding
    metrics: Metrics | None
    feature_schema: FeatureSchema
    # `local`: each hospital centres and scales every coordinate by mean and standard deviation of its own training rows
    # besides, and keeps these constants to itself. They depend on patients: refused with privacy.
    standardisation: Literal["schema", "local"] = "schema"
    personalisation: Personalisation | None = None
    # Without it no version can be promoted.
    checks: Checks | None = None
    # Names of the schema's columns that the model uses, in the order of its coordinates.
    features: Annotated[tuple[Identifier, ...], Field(min_length=1, max_length=2000)]

    @model_serializer(mode="wrap")
    def _spell(self, spell: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans without checks are spelled as before there were any: they keep their ids."""
        spelled: dict[str, Any] = spell(self)
        if self.checks is None:
            del spelled["checks"]
        return spelled

    @model_validator(mode="after")
    def _check(self) -> Self:
        # First: the vector's length follows from the subgroups.
        self._check_checks()
        self._check_features()
        reason = self.algorithm.refusal(self)
        self.require(reason is None, reason or "")
        self.require(
            self.personalisation is None or isinstance(self.model, LogisticModel),
            f"personalisation must be null for model.family = {self.model.family!r}",
        )
        self.require(
            not self.rounds.asynchronous or self.algorithm.kind in _WEIGHTABLE,
            f"rounds.mode = 'asynchronous' is refused for algorithm.kind = {self.algorithm.kind!r}",
        )
        self.require(
            not self.rounds.asynchronous or self.checks is None,
            "checks must be null for rounds.mode = 'asynchronous': no round is known beforehand to be the last one",
        )
        self._check_privacy()
        return self._check_range()

    def _check_checks(self) -> None:
        if self.checks is None:
            return
        self.require(isinstance(self.model, Network), "checks must be null for a plan that hospitals do not train")
        self.require(self.metrics is not None, "checks need metrics: set metrics, or checks to null")
        self.require(self.rounds.count >= 2, "checks need rounds.count of at least 2: the last round does not train")
        known = {column.name: column for column in self.feature_schema.columns}
        for group in self.checks.subgroups:
            found = known.get(group.column)
            self.require(found is not None, f"checks.subgroups: {group.column} is no column of the schema")
            misfit = "" if found is None else group.misfit(found)
            self.require(not misfit, f"checks.subgroups: {misfit}")
        groups = len(group_names(self.checks, known))
        self.require(groups <= MAX_GROUPS, f"checks.subgroups: {groups} groups, {MAX_GROUPS} at most")

    def _check_features(self) -> None:
        known = [column.name for column in self.feature_schema.columns]
        unknown = sorted(set(self.features) - set(known))
        self.require(
            not unknown,
            f"features: unknown feature {', '.join(unknown)}; "
            f"schema {self.feature_schema.name!r} has: {', '.join(known)}",
        )
        twice = sorted({name for name in self.features if self.features.count(name) > 1})
        self.require(not twice, f"features: {', '.join(twice)} appear twice")
        self.require(
            self.vector_length <= MAX_VECTOR_LENGTH,
            f"the plan needs {self.vector_length} coordinates, more than {MAX_VECTOR_LENGTH}",
        )

    def _check_privacy(self) -> None:
        released = self.metrics is not None and (self.metrics.epsilon is not None or self.metrics.delta is not None)
        if self.privacy is None:
            self.require(not released, "metrics.epsilon and metrics.delta must be null when privacy is null")
            return
        reason = self.algorithm.no_privacy
        self.require(reason is None, f"algorithm.kind = {self.algorithm.kind!r} is refused with privacy: {reason}")
        self.require(
            self.standardisation == "schema",
            "standardisation = 'local' is refused with privacy: a patient moves the constants, which no noise covers; "
            "use 'schema', whose centres and scales are public",
        )
        complete = self.metrics is None or (self.metrics.epsilon is not None and self.metrics.delta is not None)
        self.require(complete, "metrics.epsilon and metrics.delta are required with privacy: metrics are a release too")
        # Rounding may take sqrt(coordinates) / 2 of the clip norm: at most an eighth.
        least = max(32, math.ceil(4 * math.sqrt(self.train_length)))
        self.require(
            self.train_sensitivity >= least,
            f"encoding.scale = {self.encoding.scale:g}: clip_norm * scale must be at least {least} integer units for "
            f"{self.train_length} coordinates, or rounding would swallow what patients contribute",
        )
        self.require(
            self.train_sensitivity <= 1 << 30,
            f"encoding.scale = {self.encoding.scale:g}: clip_norm * scale must be at most 2^30 integer units, "
            "so that squared norms are exact in 64 bits",
        )

    def _check_range(self) -> Self:
        """The sum over all patients must fit a lane; the factor 2 is room for noise and for more patients."""
        if not isinstance(self.algorithm, PatientSum):
            return self
        largest: float = self.train_sensitivity
        if self.privacy is None:
            bound = self.algorithm.largest_coordinate(self)
            if bound is None:
                # Nothing to check in advance: a hospital refuses a contribution that does not fit its lane.
                return self
            largest = math.ceil(self.encoding.scale * bound)
        needed = 2 * largest * self.weight_units * self.algorithm.expected_patients
        limit = 1 << (self.encoding.bits - 1)
        return self.require(
            needed <= limit,
            f"encoding.scale = {self.encoding.scale:g} is too large: sums up to {needed:.3g} must fit "
            f"{self.encoding.bits}-bit lanes (below {limit}); lower it or use lanes = 1",
        )

    @property
    def columns(self) -> tuple[Column, ...]:
        """The schema's columns that the model uses, in the plan's order."""
        by_name = {column.name: column for column in self.feature_schema.columns}
        return tuple(by_name[name] for name in self.features)

    @property
    def subgroup_columns(self) -> tuple[Column, ...]:
        """The schema's columns that tell the subgroups of `checks` apart, in their order."""
        by_name = {column.name: column for column in self.feature_schema.columns}
        return () if self.checks is None else tuple(by_name[one.column] for one in self.checks.subgroups)

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the model's input coordinates (the intercept is not among them)."""
        return tuple(name for column in self.columns for name in column.features)

    @property
    def network(self) -> Network:
        """The model, if it is one that hospitals can train. Raises: FedmeshError(PLAN_INVALID) for another family."""
        if isinstance(self.model, Network):
            return self.model
        raise FedmeshError(Code.PLAN_INVALID, f"hospitals do not train plans of family {self.model.family!r}")

    @property
    def weights_length(self) -> int:
        """Model parameters; the last one is the intercept."""
        if isinstance(self.model, IntegerVector):
            return self.model.length
        return self.model.weights_length(len(self.feature_names))

    @property
    def train_length(self) -> int:
        """Coordinates of the training part."""
        return self.algorithm.train_length(self.weights_length)

    @property
    def metrics_length(self) -> int:
        """Coordinates of the metrics part: two histograms, positives first, and without privacy the loss."""
        if self.metrics is None:
            return 0
        return 2 * self.metrics.score_bins + (1 if self.privacy is None else 0)

    @property
    def groups(self) -> tuple[tuple[str, str], ...]:
        """(column, group) of every subgroup that the measuring round tells apart."""
        if self.checks is None:
            return ()
        return group_names(self.checks, {column.name: column for column in self.feature_schema.columns})

    @property
    def groups_length(self) -> int:
        """Coordinates of the subgroups: two histograms each, positives first, as in the metrics part."""
        return 0 if self.metrics is None else 2 * self.metrics.score_bins * len(self.groups)

    @property
    def members_length(self) -> int:
        """Coordinates of the histograms of the training patients, positives first; 0 without checks."""
        return 0 if self.metrics is None or self.checks is None else 2 * self.metrics.score_bins

    @property
    def vector_length(self) -> int:
        """Integer coordinates of one contribution: training, metrics, subgroups, training patients' histograms."""
        return self.train_length + self.metrics_length + self.groups_length + self.members_length

    @property
    def measuring_round(self) -> int | None:
        """The round that measures for `checks` and does not train: the last one. None without checks."""
        return None if self.checks is None else self.rounds.count

    @property
    def training_rounds(self) -> range:
        """The rounds (from 1) that train: all of them, less the measuring one."""
        return range(1, self.rounds.count + (1 if self.checks is None else 0))

    @property
    def without_checks(self) -> Self:
        """The plan that trains as this one does, and measures nothing for checks: its last round is left out."""
        if self.checks is None:
            return self
        rounds = self.rounds.model_copy(update={"count": self.rounds.count - 1})
        return self.model_copy(update={"checks": None, "rounds": rounds})

    @property
    def metrics_rounds(self) -> tuple[int, ...]:
        """The rounds (from 1) whose contribution carries metrics; they judge the model that the round starts from."""
        if self.metrics is None:
            return ()
        count, every = self.rounds.count, self.metrics.every_rounds
        return tuple(number for number in range(1, count + 1) if number % every == 0 or number == count)

    @property
    def largest_feature(self) -> float:
        """Upper bound of |coordinate| of one encounter's features, the intercept's 1 included."""
        return max(1.0, *(bound for column in self.columns for bound in column.bounds))

    @property
    def train_sensitivity(self) -> int:
        """Integer L2 bound of one patient's training contribution; 0 without privacy (there is no bound)."""
        return 0 if self.privacy is None else math.floor(self.privacy.clip_norm * self.encoding.scale)

    @property
    def target_s(self) -> float | None:
        """Seconds that a hospital's local steps should take; None when their number is fixed."""
        return self.algorithm.target_s if isinstance(self.algorithm, FedAvg) else None

    @property
    def weight_units(self) -> int:
        """What a training contribution of weight 1 is multiplied by before it is summed; 1 in synchronous rounds."""
        return WEIGHT_UNITS if self.rounds.asynchronous else 1

    @property
    def summed_sensitivity(self) -> int:
        """Integer L2 bound of one patient's part of the training sum: no weight is more than 1."""
        return self.train_sensitivity * self.weight_units

    @property
    def metrics_sensitivity(self) -> int:
        """Integer L2 bound of one validation patient's metrics contribution; 0 without privacy or metrics.

        An encounter adds metrics_units to one bin; in the worst case all of a patient's encounters fall in one bin.
        """
        if self.privacy is None or self.metrics is None:
            return 0
        return self.metrics.max_encounters_per_patient * self.encoding.metrics_units

    @property
    def measured_sensitivity(self) -> int:
        """As `metrics_sensitivity`, of the measuring round: metrics and subgroups together.

        An encounter adds metrics_units to one bin of the metrics part and to one bin for each subgroup column: 1 + k
        blocks of coordinates, in each of which a patient is bounded by `metrics_sensitivity`.
        """
        columns = 0 if self.checks is None else len(self.checks.subgroups)
        return math.ceil(self.metrics_sensitivity * math.sqrt(1 + columns))

    @property
    def members_sensitivity(self) -> int:
        """Integer L2 bound of one training patient's contribution to the measuring round; 0 without privacy."""
        if self.privacy is None or self.checks is None:
            return 0
        return self.privacy.max_encounters_per_patient * self.encoding.metrics_units


def load_manifest(path: Path | str) -> PlanManifest:
    """Read a plan from YAML (or JSON). `feature_schema` may be a path, relative to the plan's file.

    Raises: FedmeshError(PLAN_INVALID) naming the field, its value and what is allowed.
    """
    path = Path(path)
    document = parse_yaml(read_file(path, Code.PLAN_INVALID), path.name, Code.PLAN_INVALID)
    reference = document.get("feature_schema")
    if isinstance(reference, str):
        schema_path = path.parent / reference
        if not schema_path.is_file():
            raise FedmeshError(
                Code.PLAN_INVALID,
                f"feature_schema = {shorten(reference)!r}: there is no such file",
                field="feature_schema",
            )
        document["feature_schema"] = parse_yaml(
            read_file(schema_path, Code.PLAN_INVALID), schema_path.name, Code.PLAN_INVALID
        )
    return validate(PlanManifest, document, f"plan {path.name}", Code.PLAN_INVALID)


def parse_manifest(data: bytes) -> PlanManifest:
    """Read a plan from the wire. Only canonical bytes are accepted, so that a plan has exactly one id.

    Raises: FedmeshError(PLAN_INVALID).
    """
    require_size(data, "the plan", Code.PLAN_INVALID)
    manifest = validate_json(PlanManifest, data, "plan", Code.PLAN_INVALID)
    if canonical_bytes(manifest) != data:
        raise FedmeshError(Code.PLAN_INVALID, "the plan is not in canonical form: send the output of canonical_bytes")
    return manifest


def read_manifest(data: bytes) -> PlanManifest:
    """Read a plan that a registry stored, perhaps a release ago: fields that it lacks have their defaults.

    Raises: FedmeshError(PLAN_INVALID).
    """
    return validate_json(PlanManifest, data, "plan", Code.PLAN_INVALID)


def canonical_bytes(manifest: PlanManifest) -> bytes:
    """The plan as canonical JSON: what is stored, hashed, signed and sent."""
    return canonical_json(manifest)


def plan_id(manifest: PlanManifest) -> str:
    """SHA-256 of the canonical bytes, in 64 lower-case hex digits."""
    return hashlib.sha256(canonical_bytes(manifest)).hexdigest()


def schema_sha256(manifest: PlanManifest) -> str:
    """SHA-256 of the canonical JSON of the feature schema, in hex: what the data of every hospital had to fit."""
    return hashlib.sha256(canonical_json(manifest.feature_schema)).hexdigest()
