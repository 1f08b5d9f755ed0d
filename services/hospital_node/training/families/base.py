"""What a family is, and what fedmesh does for every family whose contribution is a sum over patients."""

import math
from abc import ABC, abstractmethod
from typing import Any, Final

import tensorflow as tf

from services.common.errors import Code, FedmeshError
from services.plans.algorithms import PatientSum
from services.plans.manifest import PlanManifest

# float64 values of all patients of a block together, 16 MiB: with a large model few patients are held at a time.
_BLOCK_VALUES: Final = 1 << 21


class Family(ABC):
    """One plan's learning, as graphs. `data` and `state` are structs as in `process.data_type` and `state_type`."""

    def __init__(self, plan: PlanManifest) -> None:
        self.plan = plan

    @abstractmethod
    def contribution(self, data: Any, state: Any) -> tf.Tensor:
        """The training part of a hospital's contribution: int64 [train_length]."""

    @abstractmethod
    def update(self, state: Any, total: tf.Tensor) -> dict[str, tf.Tensor]:
        """The next state, without `updates`, from the sum of all contributions, signed int64 [train_length]."""


class PatientFamily(Family):
    """Its contribution is the sum over patients of one vector each, aggregated from the patient's encounters.

    The platform aggregates, and with privacy clips, rounds and checks, whatever the family computes.
    """

    @abstractmethod
    def vectors(self, x: tf.Tensor, y: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
        """One vector for each encounter, from that encounter alone: float32 or float64 [rows, train_length]."""

    @property
    def algorithm(self) -> PatientSum:
        """Raises: FedmeshError(PLAN_INVALID)."""
        if not isinstance(self.plan.algorithm, PatientSum):
            raise FedmeshError(Code.PLAN_INVALID, f"{self.plan.algorithm.kind!r} sums no patients")
        return self.plan.algorithm

    def mean(self, total: tf.Tensor) -> tf.Tensor:
        """The sum in units of 1.0, divided by the public number of patients: float64 [train_length]."""
        real = tf.cast(total, tf.float64) / (self.plan.encoding.scale * self.plan.weight_units)
        return real / self.algorithm.expected_patients

    def contribution(self, data: Any, state: Any) -> tf.Tensor:
        """Block by block of patients: a block's rows lie together, because rows are sorted by patient."""
        length = self.plan.train_length
        size = tf.minimum(tf.constant(max(1, _BLOCK_VALUES // length), tf.int64), data.patients)
        private = self.plan.privacy is not None
        dtype = tf.int64 if private else tf.float64

        def step(start: tf.Tensor, total: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            low, high = tf.unstack(tf.searchsorted(data.patient, tf.stack([start, start + size])))
            vectors = tf.cast(self.vectors(data.x[low:high], data.y[low:high], state.weights), tf.float64)
            patients = self._aggregated(vectors, data.patient[low:high] - start, size)
            added = clipped_sum(self.plan, patients) if private else tf.reduce_sum(patients, axis=0)
            return start + size, total + added

        _, total = tf.while_loop(
            lambda start, _: start < data.patients,
            step,
            (tf.constant(0, tf.int64), tf.zeros([length], dtype)),
            shape_invariants=(tf.TensorShape([]), tf.TensorShape([length])),
        )
        return total if private else saturated(total * self.plan.encoding.scale, self.plan.encoding.bits)

    def _aggregated(self, vectors: tf.Tensor, patient: tf.Tensor, patients: tf.Tensor) -> tf.Tensor:
        mean = self.algorithm.patient_aggregation == "mean"
        segment = tf.math.unsorted_segment_mean if mean else tf.math.unsorted_segment_sum
        return segment(vectors, patient, patients)


def clipped_sum(plan: PlanManifest, vectors: tf.Tensor) -> tf.Tensor:
    """Each patient's vector clipped, rounded to integers, its integer norm checked, then summed: int64 [length].

    vectors: float64 [patients, length]. tensorflow_privacy's fast gradient clipping is not used: it never forms the
    per-patient vectors, it returns the sum of the clipped real ones. Here the sensitivity is decided by integers, so
    every patient's own vector has to be rounded and checked.

    Rounding moves a vector by at most sqrt(length) / 2, so clipping to sensitivity - sqrt(length) / 2 keeps every
    rounded norm within the sensitivity. The check that follows does not rely on that: a vector that is over, or was not
    finite, becomes zero. It is exact, in int64: with a sensitivity of at most 2^30 the squares add up below 2^63.
    """
    sensitivity = plan.train_sensitivity
    bound = sensitivity - math.sqrt(plan.train_length) / 2
    scaled = vectors * plan.encoding.scale
    norm = tf.norm(scaled, axis=1, keepdims=True)
    clipped = scaled * tf.minimum(tf.constant(1.0, tf.float64), bound / tf.maximum(norm, 1e-30))
    finite = tf.reduce_all(tf.math.is_finite(clipped), axis=1, keepdims=True)
    rounded = integers(tf.where(finite, clipped, tf.zeros_like(clipped)))
    square = tf.reduce_sum(rounded * rounded, axis=1, keepdims=True)
    within = square <= tf.constant(sensitivity * sensitivity, tf.int64)
    return tf.reduce_sum(tf.where(within, rounded, tf.zeros_like(rounded)), axis=0)


def integers(values: tf.Tensor) -> tf.Tensor:
    """Rounded to the nearest integer: int64."""
    return tf.cast(tf.round(values), tf.int64)


def saturated(values: tf.Tensor, bits: int) -> tf.Tensor:
    """Integers that stay recognisably out of range when the values are, or are not finite.

    MapReduceForm reduces the contribution by the lane's modulus: a value beyond it would come out as a plausible one.
    """
    largest = tf.constant(2.0 ** (bits - 1) - 1, tf.float64)
    return integers(tf.where(tf.math.is_finite(values), tf.clip_by_value(values, -largest, largest), largest))
