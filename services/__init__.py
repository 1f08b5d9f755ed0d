"""fedmesh: federated learning for a hospital consortium."""

import os

# gRPC's fork handlers crash children that are forked while calls are live, which happens when root starts a store
# under another account. fedmesh never uses gRPC in a forked child, so they are off; set before grpc is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
