"""What `fedmesh rounds` says of asynchronous rounds."""

from fedmesh.common.v1 import round_pb2
from fedmesh.registry.v1 import registry_pb2

from services.cli.inspection import ages


def test_fresh_contributions_are_counted_and_old_ones_named_with_their_weight() -> None:
    told = {"hospital-01": 0, "hospital-02": 3, "hospital-03": 0, "hospital-04": 1, "hospital-05": 3}
    done = registry_pb2.CommittedRound(
        contributions=[round_pb2.Contribution(hospital_id=name, age=age) for name, age in told.items()]
    )
    assert ages(done) == "0 (64): 2, 1 (45): hospital-04, 3 (32): hospital-02 hospital-05"
