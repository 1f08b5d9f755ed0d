"""`python -m services.aggregator --config FILE`."""

import sys

from services.aggregator.config import AggregatorConfig
from services.aggregator.main import check, main
from services.common.process import run_process

if __name__ == "__main__":
    sys.exit(run_process("aggregator", AggregatorConfig, main, check=check))
