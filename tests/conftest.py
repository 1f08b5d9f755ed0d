"""Fixtures that every suite may ask for."""

import os

# Read by gRPC when it starts, hence before any import of it. Its fork handlers crash the child of a fork made while
# calls are under way, and started by root the stores' processes are forked, to change their account.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

pytest_plugins = ["tests.support.stores"]
