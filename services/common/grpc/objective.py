"""What the service level objectives count: the methods whose access option says `objective`, and which answers fail.

The option stands beside the method in its proto (ADR 2); the failures stand here. The recording rules of the Helm chart
(`helm/fedmesh/files/rules`) count by the labels `objective` and `code` that follow from both, and a test compares them.
"""

from functools import lru_cache
from typing import Final

import grpc
from fedmesh.common.v1 import access_pb2
from google.protobuf import descriptor_pool

AVAILABILITY: Final = 0.9999
"""The part of calls that succeed."""
QUICK: Final = 0.99
"""The part of calls that end within `QUICK_S`: the objective is their 99th percentile."""
QUICK_S: Final = 0.5

# Answers that the caller did nothing to deserve. A refusal that names the caller's fault (bad input, wrong state, no
# right) is the service doing its work.
FAILED: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)


@lru_cache(maxsize=1024)
def objective_label(method: str) -> str:
    """`yes` for a method (`/package.Service/Method`) that counts; a method that is not fedmesh's does not."""
    try:
        found = descriptor_pool.Default().FindMethodByName(method.lstrip("/").replace("/", "."))
    except KeyError:
        return "no"
    return "yes" if found.GetOptions().Extensions[access_pb2.access].objective else "no"
