"""The `fedmesh` command as a process."""

import sys

FEDMESH = [sys.executable, "-c", "from services.cli.entry import main; main()"]
