"""The hospital node as a process of its own, with the NumPy trainer: `python -m tests.support.hospital_process`.

With FEDMESH_TEST_STALL=1 training never ends, and holds no lock that a signal handler would need.
"""

import os
import sys
import time

from services.common.process import run_process
from services.hospital_node import main as node
from services.hospital_node.config import HospitalConfig, check_config
from services.hospital_node.domain.ports import LocalJob, TrainerFactory
from services.plans.manifest import PlanManifest
from tests.support.hospital import NumpyTrainers


def trainers(config: HospitalConfig) -> TrainerFactory:
    def stall(_manifest: PlanManifest) -> LocalJob:
        time.sleep(600)
        raise AssertionError("nobody waits that long")

    return stall if os.environ.get("FEDMESH_TEST_STALL") else NumpyTrainers(config)


if __name__ == "__main__":
    node.local_trainers = trainers
    sys.exit(run_process("hospital_node", HospitalConfig, node.main, check=check_config))
