"""The learning process as a TensorFlow Federated computation, compiled to MapReduceForm.

This module imports TFF (10 s, 600 MB): only the compile process loads it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
import tensorflow_federated as tff

from services.hospital_node.training.families import family_of
from services.hospital_node.training.families.base import integers
from services.hospital_node.training.metrics import LOSS_UNITS
from services.hospital_node.training.networks import log_odds
from services.plans.manifest import PlanManifest


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
    """Server state: updates applied so far, weights (intercept last), momentum slot, mean of the last iterates; with an
    adaptive server optimizer also its second moment."""
    names = ["weights", "velocity", "average"] + (["squares"] if manifest.algorithm.second_moment else [])
    weights = tff.TensorType(np.float32, [manifest.weights_length])
    return tff.to_type([("updates", np.int64), *((name, weights) for name in names)])


def data_type(manifest: PlanManifest) -> Any:
    """A hospital's rows: training, sorted by patient, and validation; with privacy at most K encounters a patient.
    `measure` is 1 in metrics rounds. With local steps by speed also their number, and what the movement is multiplied
    by."""
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
    shape, family = _shape(manifest), family_of(manifest)
    state, data = state_type(manifest), data_type(manifest)

    @tff.tensorflow.computation(data, state)  # type: ignore[untyped-decorator]
    def work(data: Any, state: Any) -> tf.Tensor:
        return tf.concat([family.contribution(data, state), *_measure(manifest, data, state)], axis=0)

    @tff.tensorflow.computation(state, tff.TensorType(np.int64, [shape.vector]))  # type: ignore[untyped-decorator]
    def update(state: Any, total: tf.Tensor) -> Any:
        half, modulus = tf.constant(shape.modulus // 2, tf.int64), tf.constant(shape.modulus, tf.int64)
        signed = tf.math.floormod(total + half, modulus) - half
        return {"updates": state.updates + 1, **family.update(state, signed[: manifest.train_length])}

    @tff.federated_computation(tff.FederatedType(state, tff.SERVER), tff.FederatedType(data, tff.CLIENTS))  # type: ignore[untyped-decorator]
    def one_round(state: Any, data: Any) -> Any:
        contribution = tff.federated_map(work, (data, tff.federated_broadcast(state)))
        total = tff.backends.mapreduce.federated_secure_modular_sum(contribution, shape.modulus)
        return tff.federated_map(update, (state, total)), tff.federated_value((), tff.SERVER)

    return tff.backends.mapreduce.get_map_reduce_form_for_computation(one_round)


def _measure(manifest: PlanManifest, data: Any, state: Any) -> list[tf.Tensor]:
    """Histograms of the log-odds of positive and negative validation rows in integer units; see PlanManifest.metrics.

    All zero when `measure` is 0: nothing is released then, and no noise is needed.
    """
    metrics = manifest.metrics
    if metrics is None:
        return []
    low, high = metrics.logit_range
    logits = log_odds(manifest, data.validation_x, state.average)
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
        parts.append(tf.reduce_sum(integers(fraction * LOSS_UNITS))[tf.newaxis])
    return [data.measure * tf.concat(parts, axis=0)]
