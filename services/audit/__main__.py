"""`python -m services.audit --config FILE`."""

import sys

from services.audit.config import AuditConfig
from services.audit.main import check, main
from services.common.process import run_process

if __name__ == "__main__":
    sys.exit(run_process("audit", AuditConfig, main, check=check))
