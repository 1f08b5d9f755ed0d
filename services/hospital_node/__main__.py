"""`python -m services.hospital_node --config FILE`."""

import os
import sys

# Before NumPy or TensorFlow is loaded: many nodes may share few cores, and thread pools would only fight for them.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
os.environ.setdefault("TF_NUM_INTEROP_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from services.common.process import run_process  # noqa: E402 - the environment comes first
from services.hospital_node.config import HospitalConfig, check_config  # noqa: E402


async def main(config: HospitalConfig) -> None:
    """Serve until told to stop."""
    # Late: settings can be checked where the libraries of the sum are not installed.
    from services.hospital_node.main import main as serve

    await serve(config)


if __name__ == "__main__":
    sys.exit(run_process("hospital_node", HospitalConfig, main, check=check_config))
