"""`python -m services.coordinator --config FILE`."""

import sys

from services.common.process import run_process
from services.coordinator.config import CoordinatorConfig
from services.coordinator.main import check, main

if __name__ == "__main__":
    sys.exit(run_process("coordinator", CoordinatorConfig, main, check=check))
