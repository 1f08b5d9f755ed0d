"""A hospital's side of one plan: contribution, update, metrics, predictions."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from services.common.errors import Code, FedmeshError
from services.hospital_node.domain.attacks import LOGISTIC_REGRESSION, THRESHOLD, Attacked
from services.hospital_node.sources.dataset import Dataset, Rows, SplitName, require_training_rows
from services.hospital_node.training.attack import Attacks, Scored
from services.hospital_node.training.cache import compiled_plan
from services.hospital_node.training.checking import find, measure
from services.hospital_node.training.metrics import read_metrics
from services.hospital_node.training.personal import personalise
from services.hospital_node.training.runtime import GraphRunner, Tensor
from services.hospital_node.training.scoring import log_odds
from services.hospital_node.training.speed import StepCount
from services.hospital_node.training.state import State, initial_state, read_state
from services.plans.algorithms import FedAvg
from services.plans.manifest import MAX_HOSPITALS, PlanManifest
from services.transparency.findings import Finding

# Patients and validation rows that one call of a private plan's `work` sees, so that its memory does not grow with the
# hospital: some ten vectors of 64-bit numbers for each patient of a call.
CHUNK: Final = 1 << 14

# Training rows, and validation rows, that an attack on this hospital's own needs: of fewer it says nothing, and the
# logistic regression could not be cross-validated.
_LEAST_ATTACKED: Final = 20


@dataclass(frozen=True)
class Segment:
    """A part of the vector, coordinates [start, stop), whose patients are disjoint from the other parts' patients.

    `sensitivity` is the integer L2 bound of one patient's contribution to it; 0 means that there is no bound, because
    the plan has no privacy.
    """

    name: str
    start: int
    stop: int
    sensitivity: int

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


def segments(manifest: PlanManifest, round_number: int) -> tuple[Segment, ...]:
    """The parts that a round releases: `train`, and `metrics` in metrics rounds; the measuring round releases
    `measured` (metrics and subgroups) and `members` (the training patients' histograms) instead.

    What a round does not release is all zero, whatever the data: it needs no noise and is not charged.
    """
    train = Segment("train", 0, manifest.train_length, manifest.train_sensitivity)
    start = manifest.train_length
    if round_number == manifest.measuring_round:
        members = manifest.vector_length - manifest.members_length
        return (
            Segment("measured", start, members, manifest.measured_sensitivity),
            Segment("members", members, manifest.vector_length, manifest.members_sensitivity),
        )
    if round_number not in manifest.metrics_rounds:
        return (train,)
    return train, Segment("metrics", start, start + manifest.metrics_length, manifest.metrics_sensitivity)


def sensitivity(manifest: PlanManifest) -> tuple[int, int]:
    """(train, metrics): integer L2 sensitivities of the two parts; 0 without privacy."""
    return manifest.train_sensitivity, manifest.metrics_sensitivity


class Trainer:
    """Runs a compiled plan on one data set. Not for use by several threads at once; calls take milliseconds."""

    def __init__(self, manifest: PlanManifest, dataset: Dataset | None, cache: Path, chunk: int = CHUNK) -> None:
        """Compile the plan, or take it from `cache` (this may take some 15 s), and load the rows.

        Without a data set only `initial_state`, `update`, `metrics` and `predict` work. chunk: patients that a private
        plan works on at a time; it changes no integer, because each patient's are made from its own records alone.

        Raises: FedmeshError(DATA_INVALID): the data set is not in the plan's features or has no training rows;
            FedmeshError(INTERNAL): compiling failed.
        """
        self._manifest = manifest
        # Two, so that a check that others wait for does not wait for attacks on some hospital's own rows.
        self._check_attacks, self._own_attacks = Attacks(cache / "check.lock"), Attacks(cache / "attack.lock")
        self._compiled_length = manifest.train_length + manifest.metrics_length
        self._metrics_rounds = frozenset(manifest.metrics_rounds)
        self._parts = None if dataset is None else _capped_rows(manifest, dataset)
        self._data = None if self._parts is None else _tensor_parts(manifest, *self._parts, chunk)
        algorithm = manifest.algorithm
        self._pace = None
        if isinstance(algorithm, FedAvg) and algorithm.target_s is not None:
            self._pace = StepCount(algorithm, algorithm.target_s)
        self._rows = None
        if dataset is not None and manifest.personalisation is not None:
            # All rows, also with privacy: what is made of them stays here.
            self._rows = dataset.rows(SplitName.TRAIN), dataset.rows(SplitName.VALIDATION)
        artifact = compiled_plan(manifest, cache)
        self._work, self._update = GraphRunner(artifact.work), GraphRunner(artifact.update)
        self._modulus = Tensor(np.array(1 << manifest.encoding.bits, dtype=np.int64))

    def initial_state(self) -> bytes:
        """The state before the first round; the same at every hospital."""
        return initial_state(self._manifest)

    def contribution(self, state: bytes, round_number: int) -> NDArray[np.int64]:
        """This hospital's exact integers for round `round_number` (from 1): int64 [vector_length], before noise.

        The train part's coordinates lie within +-2^(bits - 1) / 16, so that 16 hospitals cannot wrap a lane.

        Raises: FedmeshError(INVALID_ARGUMENT): not a state of this plan; FedmeshError(WRONG_STATE): no data set, or
            training diverged.
        """
        if self._data is None:
            raise FedmeshError(Code.WRONG_STATE, "this trainer has no data set: it cannot contribute")
        measuring = Tensor(np.array(int(round_number in self._metrics_rounds), dtype=np.int64))
        present = read_state(state, self._manifest)
        base = [*self._paced(), *_state_tensors(present)]
        total = np.zeros(self._compiled_length, dtype=np.int64)
        for rows in self._data:
            (part,) = self._work([*rows, measuring, *base, self._modulus])
            total += part
        if self._pace is not None:
            self._pace.end()
        # MapReduceForm's modular sum works on residues; back to signed integers.
        half = 1 << (self._manifest.encoding.bits - 1)
        vector = (total + half) % (2 * half) - half
        vector = np.concatenate([vector, self._checked(present, round_number)])
        if round_number == self._manifest.measuring_round:
            vector[: self._manifest.train_length] = 0
        limit = half // MAX_HOSPITALS
        if self._manifest.privacy is not None:
            # Clipping a coordinate only brings two neighbouring data sets closer: the sensitivity stands.
            return np.clip(vector, -limit + 1, limit - 1)
        if bool(np.any(np.abs(vector) >= limit)):
            raise FedmeshError(
                Code.WRONG_STATE,
                "training diverged, or encoding.scale is too large: the contribution does not fit its lane",
            )
        return vector

    def _paced(self) -> list[Tensor]:
        """The number of local steps by this hospital's speed, and the scale of their delta, where the plan wants it."""
        if self._pace is None:
            return []
        steps = self._pace.begin()
        scale = self._pace.scale(steps)
        return [Tensor(np.array(steps, dtype=np.int64)), Tensor(np.array(scale, dtype=np.float32))]

    def _checked(self, present: State, round_number: int) -> NDArray[np.int64]:
        """The coordinates behind the compiled plan's: zero but in the measuring round."""
        if self._parts is not None and round_number == self._manifest.measuring_round:
            return measure(self._manifest, present.average, *self._parts)
        return np.zeros(self._manifest.groups_length + self._manifest.members_length, dtype=np.int64)

    def update(self, state: bytes, total: NDArray[np.int64], contributors: int) -> bytes:
        """The next state from the summed integers of `contributors` hospitals.

        `total`: int64 [vector_length], signed, as decrypted (or modulo 2^bits: both mean the same).

        Raises: FedmeshError(INVALID_ARGUMENT): wrong state or shape, no contributor; FedmeshError(WRONG_STATE): the
            update is not finite.
        """
        if total.shape != (self._manifest.vector_length,) or total.dtype != np.int64 or contributors < 1:
            raise FedmeshError(
                Code.INVALID_ARGUMENT,
                f"the sum must be int64 [{self._manifest.vector_length}] of at least one contributor, "
                f"not {total.dtype} {list(total.shape)} of {contributors}",
            )
        inputs = [*_state_tensors(read_state(state, self._manifest)), Tensor(total[: self._compiled_length])]
        updates, *arrays = self._update(inputs)
        if not all(np.isfinite(values).all() for values in arrays):
            raise FedmeshError(Code.WRONG_STATE, "the update is not finite: training diverged")
        return State(int(updates), *arrays).to_bytes()

    def metrics(self, total: NDArray[np.int64]) -> dict[str, float | None]:
        """loss, auroc, auprc, positives, negatives on validation rows; None where the sum carries none.

        They judge the state that the round started from.
        """
        return read_metrics(self._manifest, total)

    def findings(self, peaks: Mapping[int, float], measured: NDArray[np.int64]) -> tuple[Finding, ...]:
        """The results of the hospitals' checks; see `checking.find`."""
        return find(self._manifest, peaks, measured, self._check_attacks)

    def attack(self, state: bytes) -> tuple[Attacked, ...]:
        """Attacks on membership against this hospital's own rows, exact: what they find must not leave the hospital.

        With privacy, training patients are given as few encounters as validation patients: the attack would otherwise
        tell how often patients come, not what was learnt.

        Raises: FedmeshError(WRONG_STATE): no data set; FedmeshError(INVALID_ARGUMENT): not a state of this plan;
            FedmeshError(INTERNAL): the attack failed.
        """
        if self._parts is None:
            raise FedmeshError(Code.WRONG_STATE, "this trainer has no data set: there is nothing to attack")
        privacy, metrics = self._manifest.privacy, self._manifest.metrics
        weights = read_state(state, self._manifest).average.astype(np.float64)

        def scored(rows: Rows) -> Scored:
            if privacy is not None and metrics is not None:
                rows = _capped(rows, min(privacy.max_encounters_per_patient, metrics.max_encounters_per_patient))
            scores = log_odds(self._manifest, weights, rows.x.astype(np.float64))
            known = np.isfinite(scores)
            return Scored(scores[known], (rows.y[known] > 0.5).astype(np.int64))

        members, others = map(scored, self._parts)
        return self._own_attacks.run((THRESHOLD, LOGISTIC_REGRESSION), members, others, _LEAST_ATTACKED)

    def personalise(self, state: bytes) -> bytes:
        """This hospital's own version of a state; see `personal.personalise`. It must not leave the hospital.

        Raises: FedmeshError(WRONG_STATE): no data set, or the plan has no personalisation; FedmeshError(
            INVALID_ARGUMENT): not a state of this plan.
        """
        if self._rows is None:
            raise FedmeshError(Code.WRONG_STATE, "this trainer has no data set, or its plan makes no personal models")
        return personalise(self._manifest, state, *self._rows)

    def predict(self, state: bytes, x: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probability of the outcome for each row of x, float32 [n, features]: float64 [n]."""
        return predict(self._manifest, state, x)


def predict(manifest: PlanManifest, state: bytes, x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probability of the outcome by the served model, float64 [n]; needs neither data set nor TensorFlow.

    Raises: FedmeshError(INVALID_ARGUMENT) when the state or the width of x does not fit the plan.
    """
    weights = read_state(state, manifest).average.astype(np.float64)
    features = len(manifest.feature_names)
    if x.ndim != 2 or x.shape[1] != features:
        raise FedmeshError(Code.INVALID_ARGUMENT, f"rows must have {features} features, not {list(x.shape)}")
    logits = log_odds(manifest, weights, x.astype(np.float64))
    # tanh never overflows, exp would.
    probabilities: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits))
    return probabilities


def _capped_rows(manifest: PlanManifest, dataset: Dataset) -> tuple[Rows, Rows]:
    """Training rows, by patient, and validation rows; at most as many of a patient as the plan's sensitivities say.

    Raises: FedmeshError(DATA_INVALID).
    """
    if dataset.feature_names != manifest.feature_names:
        raise FedmeshError(Code.DATA_INVALID, "the data set was read for another plan: its features differ")
    train, validation = dataset.rows(SplitName.TRAIN), dataset.rows(SplitName.VALIDATION)
    require_training_rows(len(train.y))
    if manifest.privacy is not None:
        train = _capped(train, manifest.privacy.max_encounters_per_patient)
        if manifest.metrics is not None:
            validation = _capped(validation, manifest.metrics.max_encounters_per_patient)
    # The graphs take a patient's rows as they lie, without looking for others.
    return _rows_at(train, np.argsort(train.patient, kind="stable")), validation


def _rows_at(rows: Rows, at: NDArray[Any]) -> Rows:
    """Some of the rows, by position or by mask; `patients` stays."""
    return replace(
        rows,
        x=rows.x[at],
        y=rows.y[at],
        patient=rows.patient[at],
        encounter_ids=rows.encounter_ids[at],
        patient_ids=rows.patient_ids[at],
        groups=None if rows.groups is None else rows.groups[at],
    )


def _tensor_parts(manifest: PlanManifest, train: Rows, validation: Rows, chunk: int) -> list[list[Tensor]]:
    """The data part of `work`'s argument in TensorFlow's memory, in the order of process.data_type, less `measure`.

    With privacy one such part for every `chunk` patients, in whatever order: integers add up exactly. Without it the
    sums are of real numbers, whose rounding would depend on the parts: there is one.
    """
    if manifest.privacy is None:
        return [_tensors(train, train.patients, validation.x, validation.y)]
    return list(_chunks(train, validation, chunk))


def _chunks(train: Rows, validation: Rows, chunk: int) -> Iterator[list[Tensor]]:
    """`chunk` training patients with all their rows, in their order, and `chunk` validation rows, at a time."""
    for start in range(0, max(train.patients, len(validation.y)), chunk):
        first, last = np.searchsorted(train.patient, [start, start + chunk])
        part = replace(train, x=train.x[first:last], y=train.y[first:last], patient=train.patient[first:last] - start)
        patients = max(0, min(chunk, train.patients - start))
        yield _tensors(part, patients, validation.x[start : start + chunk], validation.y[start : start + chunk])


def _tensors(
    train: Rows, patients: int, validation_x: NDArray[np.float32], validation_y: NDArray[np.float32]
) -> list[Tensor]:
    return [
        Tensor(train.x),
        Tensor(train.y),
        Tensor(train.patient),
        Tensor(np.array(patients, dtype=np.int64)),
        Tensor(validation_x),
        Tensor(validation_y),
    ]


def _capped(rows: Rows, cap: int) -> Rows:
    """At most `cap` encounters of each patient: those whose ids have the smallest SHA-256.

    The choice depends on nothing but the patient's own records, so the other patients' contributions stay as they are
    when one is added or removed.
    """
    # Most patients have few encounters: only the others' ids are hashed.
    over = np.flatnonzero(np.bincount(rows.patient, minlength=rows.patients)[rows.patient] > cap)
    digests = {row: hashlib.sha256(str(rows.encounter_ids[row]).encode()).digest() for row in over.tolist()}
    taken = np.zeros(rows.patients, dtype=np.int64)
    keep = np.ones(len(rows.patient), dtype=bool)
    for row in sorted(digests, key=digests.__getitem__):
        patient = rows.patient[row]
        keep[row] = taken[patient] < cap
        taken[patient] += 1
    return _rows_at(rows, keep)


def _state_tensors(state: State) -> list[Tensor]:
    updates = np.array(state.updates, dtype=np.int64)
    return [Tensor(updates), *(Tensor(array) for array in state.arrays)]
