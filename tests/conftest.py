"""Fixtures that every suite may ask for."""

import os
import signal

from hypothesis import HealthCheck, settings

# Read by gRPC when it starts, hence before any import of it. Its fork handlers crash the child of a fork made while
# calls are under way, and started by root the stores' processes are forked, to change their account.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

# A script's background job starts with SIGINT ignored, and every child inherits that: tests that press Ctrl-C would
# press it in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes, or is made, says how busy the machine is.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")

pytest_plugins = ["tests.support.stores"]
