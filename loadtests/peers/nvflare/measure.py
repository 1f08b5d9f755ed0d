"""Runs inside NVFlare's environment: bytes of an encrypted update, and the centre's CPU to add them.

Every step is NVFlare's own: `HEBuilder` makes the context as provisioning does, `HEModelEncryptor` encrypts as a
client's filter does, FOBS serialises as its cells do, `HEInTimeAccumulateWeightedAggregator` adds as its server does.

    python measure.py REPORT CLIENTS RUNS PARAMS,PARAMS,...
"""

import json
import logging
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import tenseal as ts
from nvflare.apis.dxo import DXO, DataKind, MetaKey, from_shareable
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from nvflare.apis.utils.decomposers import flare_decomposers
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_opt.he.intime_accumulate_model_aggregator import HEInTimeAccumulateWeightedAggregator
from nvflare.app_opt.he.model_encryptor import HEModelEncryptor
from nvflare.fuel.utils import fobs
from nvflare.lighter.impl.he import HEBuilder

LAYER = "weights"  # one layer: FOBS adds the context to each, so more layers would cost more bytes
TOLERANCE = 1e-4  # CKKS is approximate


def vector(client: int, size: int) -> np.ndarray:
    """float64[size] in [-1, 1)."""
    return np.random.default_rng(client).uniform(-1.0, 1.0, size)


def encrypted_update(encryptor: HEModelEncryptor, client: int, size: int) -> bytes:
    """What a client sends: its update, encrypted and serialised."""
    update = DXO(DataKind.WEIGHT_DIFF, data={LAYER: vector(client, size)})
    update.set_meta_prop(MetaKey.NUM_STEPS_CURRENT_ROUND, 1)
    encrypted = encryptor._process(update, FLContext())
    return fobs.dumps(encrypted.to_shareable())


def new_aggregator() -> HEInTimeAccumulateWeightedAggregator:
    """The server's aggregator at the start of a round."""
    aggregator = HEInTimeAccumulateWeightedAggregator(weigh_by_local_iter=False)
    aggregator._initialize(aggregator.aggregation_weights, aggregator.exclude_vars, aggregator.expected_data_kind)
    return aggregator


def centre(updates: list[bytes]) -> tuple[float, float, Shareable]:
    """CPU seconds to deserialise and add all updates, CPU seconds to finish the average, and the average."""
    aggregator = new_aggregator()
    context = FLContext()
    context.set_prop(AppConstants.CURRENT_ROUND, 1)
    began = time.process_time()
    for client, update in enumerate(updates):
        shareable = fobs.loads(update)
        shareable.set_peer_props({ReservedKey.IDENTITY_NAME: f"site-{client}"})
        shareable.add_cookie(AppConstants.CONTRIBUTION_ROUND, 1)
        if not aggregator.accept(shareable, context):
            raise RuntimeError("NVFlare's aggregator did not accept an update")
    added = time.process_time()
    average = aggregator.aggregate(context)
    return added - began, time.process_time() - added, average


def measure(builder: HEBuilder, clients: int, runs: int, size: int) -> dict[str, object]:
    """All figures of one vector length."""
    context = ts.context_from(builder.get_serialized_context(is_client=True))
    encryptor = HEModelEncryptor(weigh_by_local_iter=True)
    encryptor.tenseal_context = context
    encryptor.n_iter = 1
    encryptor.encrypt_layers = [True]
    updates = [encrypted_update(encryptor, client, size) for client in range(clients)]
    centre(updates)  # warm-up
    samples = [centre(updates) for _ in range(runs)]
    average = from_shareable(samples[-1][2]).data[LAYER]
    decrypted = np.array(average.decrypt(context.secret_key()))
    expected = sum(vector(client, size) for client in range(clients)) / clients
    ciphertext = len(ts.ckks_vector(context, vector(0, size)).serialize())
    return {
        "params": size,
        "upload_bytes_per_parameter": round(len(updates[0]) / size, 3),
        "ciphertext_bytes_per_parameter": round(ciphertext / size, 3),
        "centre_cpu_s": round(statistics.median(sample[0] for sample in samples), 4),
        "centre_finish_cpu_s": round(statistics.median(sample[1] for sample in samples), 4),
        "runs": runs,
        "exact": bool(np.max(np.abs(decrypted - expected)) < TOLERANCE),
    }


def main(report: str, clients: int, runs: int, sizes: list[int]) -> None:
    """Measure every size; one JSON line each into `report`."""
    logging.disable(logging.CRITICAL)
    flare_decomposers.register()
    builder = HEBuilder()
    builder.initialize(None, None)
    settings = {
        "poly_modulus_degree": builder.poly_modulus_degree,
        "coeff_mod_bit_sizes": builder.coeff_mod_bit_sizes,
        "scale_bits": builder.scale_bits,
        "scheme": "CKKS",
        "layers": 1,
    }
    with Path(report).open("a", buffering=1) as out:
        out.write(json.dumps({"settings": settings}) + "\n")
        for size in sizes:
            out.write(json.dumps(measure(builder, clients, runs, size)) + "\n")
        out.write(json.dumps({"finished": True}) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), [int(size) for size in sys.argv[4].split(",")])
