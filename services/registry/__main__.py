"""`python -m services.registry --config FILE`."""

import sys

from services.common.process import run_process
from services.registry.config import RegistryConfig
from services.registry.main import check, main

if __name__ == "__main__":
    sys.exit(run_process("registry", RegistryConfig, main, check=check))
