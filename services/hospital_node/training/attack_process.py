"""`python -m services.hospital_node.training.attack_process`: attacks on what is read from standard input.

It answers with one line of JSON, and ends before that when its standard input ends: nobody waits any more.
"""

import io
import json
import os
import sys
import threading
from dataclasses import asdict

import numpy as np

from services.hospital_node.domain.attacks import ALL, LOGISTIC_REGRESSION, NEGATIVES, POSITIVES, THRESHOLD, Attacked
from services.hospital_node.training.attack import LENGTH


def _attacked(request: bytes) -> list[Attacked]:
    """The attacks of a request as `attack.Attacks` packs it."""
    # tensorflow_privacy's own switch: without it, its __init__ imports TensorFlow and everything else that it has.
    sys.skip_tf_privacy_import = True  # type: ignore[attr-defined]
    from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack.data_structures import (
        AttackInputData,
        AttackType,
        SlicingSpec,
    )
    from tensorflow_privacy.privacy.privacy_tests.membership_inference_attack.membership_inference_attack import (
        run_attacks,
    )

    arrays = np.load(io.BytesIO(request))
    sides = {}
    for side in ("train", "test"):
        scores, outcomes = arrays[f"scores_{side}"], arrays[f"outcomes_{side}"]
        sides[f"logits_{side}"] = np.stack([np.zeros_like(scores), scores], axis=1)
        sides[f"labels_{side}"] = outcomes
        sides[f"loss_{side}"] = np.logaddexp(0.0, np.where(outcomes == 1, -scores, scores))
    types = {THRESHOLD: AttackType.THRESHOLD_ATTACK, LOGISTIC_REGRESSION: AttackType.LOGISTIC_REGRESSION}
    names = {kind: name for name, kind in types.items()}
    # It balances members and others by chance: the same each time.
    np.random.seed(0)
    results = run_attacks(
        AttackInputData(**sides, loss_function_using_logits=True),
        SlicingSpec(entire_dataset=True, by_class=True),
        [types[str(name)] for name in arrays["attacks"]],
        min_num_samples=int(arrays["least"]),
    )
    return [
        Attacked(
            names[one.attack_type],
            ALL if one.slice_spec.entire_dataset else (NEGATIVES, POSITIVES)[one.slice_spec.value],
            int(one.data_size.ntrain),
            int(one.data_size.ntest),
            float(one.get_auc()),
            float(one.get_attacker_advantage()),
        )
        for one in results.single_attack_results
    ]


def _read(size: int) -> bytes:
    content = b""
    while len(content) < size and (part := os.read(0, size - len(content))):
        content += part
    return content


def _end_with_parent() -> None:
    os.read(0, 1)
    os._exit(1)


def main() -> int:
    (length,) = LENGTH.unpack(_read(LENGTH.size))
    request = _read(length)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    print(json.dumps([asdict(one) for one in _attacked(request)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
