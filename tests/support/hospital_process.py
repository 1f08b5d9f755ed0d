"""The hospital node as a process of its own, with the NumPy trainer: `python -m tests.support.hospital_process`.

With FEDMESH_TEST_STALL=FILE training never ends and has started a child, whose id is in FILE.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

from services.common.process import run_process
from services.hospital_node import main as node
from services.hospital_node.config import HospitalConfig, check_config
from services.hospital_node.domain.ports import LocalJob, TrainerFactory
from services.plans.manifest import PlanManifest
from tests.support.hospital import NumpyTrainers


def trainers(config: HospitalConfig) -> TrainerFactory:
    def stall(manifest: PlanManifest) -> LocalJob:
        child = subprocess.Popen(["sleep", "600"], start_new_session=True)
        Path(os.environ["FEDMESH_TEST_STALL"]).write_text(str(child.pid))
        time.sleep(600)
        raise AssertionError("nobody waits that long")

    if "FEDMESH_TEST_STALL" in os.environ:
        return stall
    return NumpyTrainers(config)


if __name__ == "__main__":
    node.local_trainers = trainers
    sys.exit(run_process("hospital_node", HospitalConfig, node.main, check=check_config))
