"""The learning process as a TensorFlow Federated computation, compiled to MapReduceForm.

This module imports TFF (10 s, 600 MB): only the compile process loads it.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from services.common.errors import Code, FedmeshError
from services.hospital_node.training.metrics import LOSS_UNITS
from services.plans.manifest import FedAvg, GradientDescent, PlanManifest


@dataclass(frozen=True)
class _Shape:
    """Sizes that the graphs are built for."""

    features: int
    weights: int
    vector: int
    modulus: int


def _shape(manifest: PlanManifest) -> _Shape:
    return _Shape(
        features=len(manifest.feature_names),
        weights=manifest.weights_length,
        vector=manifest.vector_length,
        modulus=1 << manifest.encoding.bits,
    )


def state_type(manifest: PlanManifest) -> Any:
    """Server state: updates applied so far, weights (intercept last), momentum slot, mean of the last iterates."""
    weights = tff.TensorType(np.float32, [manifest.weights_length])
    return tff.to_type([("updates", np.int64), ("weights", weights), ("velocity", weights), ("average", weights)])


def data_type(manifest: PlanManifest) -> Any:
    """A hospital's rows: training and validation, at most K encounters a patient; `measure` is 1 in metrics rounds.

    With local steps by speed also their number, and what the delta is multiplied by.
    """
    features = len(manifest.feature_names)
    matrix, vector = tff.TensorType(np.float32, [None, features]), tff.TensorType(np.float32, [None])
    return tff.to_type(
        [
            ("x", matrix),
            ("y", vector),
            ("patient", tff.TensorType(np.int64, [None])),
            ("patients", np.int64),
            ("validation_x", matrix),
            ("validation_y", vector),
            ("measure", np.int64),
            *([("steps", np.int64), ("scale", np.float32)] if manifest.target_s is not None else []),
        ]
    )


def map_reduce_form(manifest: PlanManifest) -> Any:
    """The plan as `tff.backends.mapreduce.MapReduceForm`.

    `work` maps (data, [state, modulus]) to the contribution, int64 [vector_length], in the secure-modular-sum slot;
    `update` maps (state, sum) to the next state. The sum is taken modulo 2^bits; `update` reads it as signed.
    """
    shape = _shape(manifest)
    state, data = state_type(manifest), data_type(manifest)

    @tff.tensorflow.computation(data, state)  # type: ignore[untyped-decorator]
    def work(data: Any, state: Any) -> tf.Tensor:
        return tf.concat([_train(manifest, data, state), *_measure(manifest, data, state)], axis=0)

    @tff.tensorflow.computation(state, tff.TensorType(np.int64, [shape.vector]))  # type: ignore[untyped-decorator]
    def update(state: Any, total: tf.Tensor) -> Any:
        half, modulus = tf.constant(shape.modulus // 2, tf.int64), tf.constant(shape.modulus, tf.int64)
        signed = tf.math.floormod(total + half, modulus) - half
        return _update(manifest, state, signed[: manifest.train_length])

    @tff.federated_computation(tff.FederatedType(state, tff.SERVER), tff.FederatedType(data, tff.CLIENTS))  # type: ignore[untyped-decorator]
    def one_round(state: Any, data: Any) -> Any:
        contribution = tff.federated_map(work, (data, tff.federated_broadcast(state)))
        total = tff.backends.mapreduce.federated_secure_modular_sum(contribution, shape.modulus)
        return tff.federated_map(update, (state, total)), tff.federated_value((), tff.SERVER)

    return tff.backends.mapreduce.get_map_reduce_form_for_computation(one_round)


def _logits(x: tf.Tensor, weights: tf.Tensor) -> tf.Tensor:
    return tf.linalg.matvec(x, weights[:-1]) + weights[-1]


def _descent(manifest: PlanManifest) -> GradientDescent:
    if not isinstance(manifest.algorithm, GradientDescent):
        raise FedmeshError(Code.PLAN_INVALID, f"hospitals do not train by {manifest.algorithm.kind!r}")
    return manifest.algorithm


def _train(manifest: PlanManifest, data: Any, state: Any) -> tf.Tensor:
    if isinstance(manifest.algorithm, FedAvg):
        return _averaging(manifest, manifest.algorithm, data, state)
    gradients = _patient_gradients(_descent(manifest), data, state.weights)
    if manifest.privacy is None:
        total = tf.reduce_sum(tf.cast(gradients, tf.float64), axis=0)
        return _saturated(total * manifest.encoding.scale, manifest.encoding.bits)
    return _clipped_sum(manifest, gradients)


def _patient_gradients(algorithm: GradientDescent, data: Any, weights: tf.Tensor) -> tf.Tensor:
    """Gradient of the log loss, summed or averaged over each patient's encounters: float32 [patients, weights]."""
    residual = tf.math.sigmoid(_logits(data.x, weights)) - data.y
    gradient = tf.concat([data.x, tf.ones_like(data.x[:, :1])], axis=1) * residual[:, tf.newaxis]
    segment = tf.math.unsorted_segment_mean if algorithm.patient_aggregation == "mean" else tf.math.unsorted_segment_sum
    return segment(gradient, data.patient, data.patients)


def _clipped_sum(manifest: PlanManifest, gradients: tf.Tensor) -> tf.Tensor:
    """Each patient's gradient clipped, rounded to integers, its integer norm checked, then summed: int64 [weights].

    tensorflow_privacy's fast gradient clipping is not used: it never forms the per-patient vectors, it returns the
    sum of the clipped real ones. Here the sensitivity is decided by integers, so every patient's own vector has to be
    rounded and checked, and for this model it is small enough to be formed.

    Rounding moves a vector by at most sqrt(weights) / 2, so clipping to sensitivity - sqrt(weights) / 2 keeps every
    rounded norm within the sensitivity. The check that follows does not rely on that: a vector that is over, or was
    not finite, becomes zero. It is exact, in int64: with a sensitivity of at most 2^30 the squares add up below 2^63.
    """
    sensitivity = manifest.train_sensitivity
    bound = sensitivity - math.sqrt(manifest.weights_length) / 2
    scaled = tf.cast(gradients, tf.float64) * manifest.encoding.scale
    norm = tf.norm(scaled, axis=1, keepdims=True)
    clipped = scaled * tf.minimum(tf.constant(1.0, tf.float64), bound / tf.maximum(norm, 1e-30))
    finite = tf.reduce_all(tf.math.is_finite(clipped), axis=1, keepdims=True)
    integers = _integers(tf.where(finite, clipped, tf.zeros_like(clipped)))
    square = tf.reduce_sum(integers * integers, axis=1, keepdims=True)
    within = square <= tf.constant(sensitivity * sensitivity, tf.int64)
    return tf.reduce_sum(tf.where(within, integers, tf.zeros_like(integers)), axis=0)


def _averaging(manifest: PlanManifest, algorithm: FedAvg, data: Any, state: Any) -> tf.Tensor:
    """n_k * (local weights - state weights), then n_k, in integer units: int64 [weights + 1]."""
    rows = tf.cast(tf.shape(data.y)[0], tf.float32)
    penalty = _penalty(manifest)
    ones = tf.ones_like(data.x[:, :1])

    def step(number: tf.Tensor, weights: tf.Tensor, velocity: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        residual = tf.math.sigmoid(_logits(data.x, weights)) - data.y
        total = tf.concat(
            [tf.linalg.matvec(data.x, residual, transpose_a=True), tf.linalg.matvec(ones, residual, transpose_a=True)],
            axis=0,
        )
        velocity = algorithm.momentum * velocity + total / tf.maximum(rows, 1.0) + penalty * weights
        return number + 1, weights - algorithm.learning_rate * velocity, velocity

    steps = algorithm.local_steps if algorithm.target_s is None else tf.cast(data.steps, tf.int32)
    _, weights, _ = tf.while_loop(
        lambda number, *_: number < steps,
        step,
        (tf.constant(0), state.weights, tf.zeros_like(state.weights)),
    )
    delta = tf.cast(weights - state.weights, tf.float64) * tf.cast(rows, tf.float64)
    if algorithm.target_s is not None:
        delta *= tf.cast(data.scale, tf.float64)
    delta = _saturated(delta * manifest.encoding.scale, manifest.encoding.bits)
    return tf.concat([delta, [tf.cast(rows, tf.int64)]], axis=0)


def _measure(manifest: PlanManifest, data: Any, state: Any) -> list[tf.Tensor]:
    """Histograms of the log-odds of positive and negative validation rows in integer units; see PlanManifest.metrics.

    All zero when `measure` is 0: nothing is released then, and no noise is needed.
    """
    metrics = manifest.metrics
    if metrics is None:
        return []
    low, high = metrics.logit_range
    logits = _logits(data.validation_x, state.average)
    # Clipped before the cast: a huge float has no int64.
    position = tf.clip_by_value(tf.floor((logits - low) / (high - low) * metrics.score_bins), 0, metrics.score_bins - 1)
    negative = tf.cast(data.validation_y < 0.5, tf.int64)
    counts = tf.math.unsorted_segment_sum(
        tf.ones_like(negative), negative * metrics.score_bins + tf.cast(position, tf.int64), 2 * metrics.score_bins
    )
    parts = [counts * manifest.encoding.metrics_units]
    if manifest.privacy is None:
        losses = tf.nn.sigmoid_cross_entropy_with_logits(labels=data.validation_y, logits=logits)
        fraction = tf.minimum(tf.cast(losses, tf.float64) / metrics.loss_clip, 1.0)
        parts.append(tf.reduce_sum(_integers(fraction * LOSS_UNITS))[tf.newaxis])
    return [data.measure * tf.concat(parts, axis=0)]


def _update(manifest: PlanManifest, state: Any, total: tf.Tensor) -> Any:
    algorithm = manifest.algorithm
    # In asynchronous rounds a contribution of weight 1 counts this often, and so do the rows.
    units = manifest.weight_units
    real = tf.cast(total, tf.float64) / (manifest.encoding.scale * units)
    if isinstance(algorithm, FedAvg):
        # The last coordinate counts rows and is not scaled.
        rows = tf.maximum(tf.cast(total[-1], tf.float64) / units, 1.0)
        direction = -tf.cast(real[:-1] / rows, tf.float32)
        momentum, rate = algorithm.server_momentum, algorithm.server_learning_rate
    else:
        descent = _descent(manifest)
        mean = tf.cast(real / descent.expected_patients, tf.float32)
        direction = mean + _penalty(manifest) * state.weights
        momentum, rate = descent.momentum, descent.learning_rate
    velocity = momentum * state.velocity + direction
    weights = state.weights - rate * velocity
    updates = state.updates + 1
    return {
        "updates": updates,
        "weights": weights,
        "velocity": velocity,
        "average": _average(manifest, updates, weights, state.average),
    }


def _average(manifest: PlanManifest, updates: tf.Tensor, weights: tf.Tensor, average: tf.Tensor) -> tf.Tensor:
    """Mean of the iterates since the averaging window opened; the iterate itself before and at its first one."""
    window = manifest.algorithm.average_last if isinstance(manifest.algorithm, GradientDescent) else 1
    inside = tf.maximum(updates - (manifest.rounds.count - window), 1)
    # In this form a window of one gives the iterate exactly.
    share = 1.0 / tf.cast(inside, tf.float32)
    return weights * share + average * (1.0 - share)


def _penalty(manifest: PlanManifest) -> tf.Tensor:
    """The ridge factor of each weight; the intercept has none."""
    return tf.constant([manifest.logistic.l2] * len(manifest.feature_names) + [0.0], tf.float32)


def _integers(values: tf.Tensor) -> tf.Tensor:
    return tf.cast(tf.round(values), tf.int64)


def _saturated(values: tf.Tensor, bits: int) -> tf.Tensor:
    """Integers that stay recognisably out of range when the values are, or are not finite.

    MapReduceForm reduces the contribution by the lane's modulus: a value beyond it would come out as a plausible one.
    """
    largest = tf.constant(2.0 ** (bits - 1) - 1, tf.float64)
    return _integers(tf.where(tf.math.is_finite(values), tf.clip_by_value(values, -largest, largest), largest))
